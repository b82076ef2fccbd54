"""What a rollout layout must satisfy, checked before any process starts: pure functions of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_tensor_parallel(config_json: Mapping[str, Any], tp: int, world: int) -> None:
    """Raise ValueError unless `tp` ranks can share one copy of the model in a world of `world` ranks.

    vLLM's rules: whole attention heads and whole columns of the feed-forward layer per rank; key-value
    heads are cut when there are at least `tp` of them, else copied.
    """
    if tp < 1:
        raise ValueError(f"rollout.tensor_parallel must be >= 1, got {tp}")
    if world % tp:
        raise ValueError(
            f"rollout.tensor_parallel must divide the actor's {world} slots, got {tp}; "
            f"set it to one of {_divisors(world)} or give the pool a multiple of {tp} slots"
        )
    text = config_json.get("text_config", config_json)
    heads = int(text.get("num_attention_heads") or text["n_head"])  # GPT-2 calls it n_head
    if heads % tp:
        raise ValueError(
            f"rollout.tensor_parallel must divide the model's {heads} attention heads, got {tp}; "
            f"set it to one of {_divisors(heads)}"
        )
    kv_heads = int(text.get("num_key_value_heads") or heads)
    if kv_heads % tp and tp % kv_heads:
        raise ValueError(
            f"rollout.tensor_parallel must divide the model's {kv_heads} key-value heads or be a multiple of them, "
            f"got {tp}; set it to one of {[d for d in _divisors(heads) if not (kv_heads % d and d % kv_heads)]}"
        )
    width = int(text.get("intermediate_size") or 0)
    if width % tp:
        raise ValueError(
            f"rollout.tensor_parallel must divide the model's intermediate_size {width}, got {tp}; "
            f"set it to one of {[d for d in _divisors(heads) if width % d == 0]}"
        )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
