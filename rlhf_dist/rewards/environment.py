"""What a reward's process inherits of the environment: where things are and how libraries compute, and no more.

A reward function is often somebody else's, and what it computes on is what a model wrote. Tokens and keys of whoever
starts a run are none of its business; those that it needs (of a judge's server, say) are named in `reward.environment`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rlhf_dist.secret_settings import is_secret

NAMES = frozenset("HOME LANG LANGUAGE LD_LIBRARY_PATH LOGNAME PATH SHELL TERM TMPDIR TZ USER VIRTUAL_ENV".split())
STARTS = (
    "CUDA_", "HF_", "KMP_", "LC_", "MKL_", "NUMBA_", "NVIDIA_", "OMP_", "OPENBLAS_", "PYTHON", "PYTORCH_", "RLHF_DIST_",
    "SSL_CERT_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "XDG_",
)  # fmt: skip


def environment_of_reward(own: Mapping[str, str], named: Iterable[str] = ()) -> dict[str, str]:
    """The variables of a reward's process. named: those it gets besides. Raises ValueError for one that is not set."""
    kept = {
        name: value for name, value in own.items() if (name in NAMES or name.startswith(STARTS)) and not is_secret(name)
    }
    for name in named:
        if name not in own:
            raise ValueError(f"reward.environment names {name}, which is not set where rewards are computed")
        kept[name] = own[name]
    return kept
