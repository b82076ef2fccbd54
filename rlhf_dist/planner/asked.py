"""What a launch's overrides ask of a plan: strategies that are given, and settings that the model does not know.

actor.engine.tensor_parallel=4   ->  {actor: {tp: 4}}         the search keeps to it
actor.engine.lora.rank=16        ->  a note: planned as if it were not set
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_dist.compose import Launch

STRATEGIES = {
    "engine.tensor_parallel": ("", "tp"), "engine.sequence_parallel": ("", "sp"), "engine.zero_stage": ("", "zero"),
    "engine.offload": ("", "offload"), "engine.activation_checkpointing": (".train", "recompute"),
    "rollout.tensor_parallel": (".generate", "tp"),
}  # fmt: skip
"""Setting of a role -> (suffix of the strategy's key, its field), as in a case file's `strategies`."""
UNKNOWN = (
    "engine.lora", "engine.dtype", "engine.packing", "engine.micro_batch_tokens", "engine.replicas", "rollout.dtype",
    "rollout.engine", "rollout.kv_cache_bytes", "rollout.gpu_memory_share",
)  # fmt: skip
"""Settings of a role that change seconds or bytes and that the model does not know."""


def asked_strategies(launch: Launch, overrides: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(strategies by node, role or role's phase, what is not modelled) of what was set by hand."""
    strategies: dict[str, dict[str, Any]] = {}
    ignored: list[str] = []
    for text in overrides:
        key = text.lstrip("+").partition("=")[0]
        if key == "model.dtype" and "float32" in text:
            ignored.append(text)
        role, _, setting = key.partition(".")
        settings = launch.used_roles.get(role)
        if settings is None or settings.model is None:
            continue
        if setting in ("engine", "engine.name"):
            if settings.engine.name == "deepspeed":  # It has neither tensor nor sequence parallelism.
                strategies.setdefault(role, {}).update(tp=1, sp=1)
        elif setting in STRATEGIES:
            suffix, field = STRATEGIES[setting]
            value: Any = settings
            for name in setting.split("."):
                value = getattr(value, name)
            strategies.setdefault(role + suffix, {})[field] = value != "none" if field == "offload" else value
        elif setting.startswith(UNKNOWN):
            ignored.append(text)
    return strategies, ignored
