"""Untrusted programs (of a policy, of a data file) run where they can reach nothing: `Sandbox`.

Needs Linux, and bubblewrap or unshare(1) with user namespaces; libseccomp. Nothing of torch, Ray or vLLM.
"""

from rlhf_dist.sandbox.limits import Limits, Outcome, Result, SandboxError
from rlhf_dist.sandbox.sandbox import Sandbox

__all__ = ["Limits", "Outcome", "Result", "Sandbox", "SandboxError"]
