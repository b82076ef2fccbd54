"""What config.json says of a model that three short rows do not show, held against what its layers asked for.

    field                        short rows               rule
    sliding_window, ...          shorter than it          some layer of the packed pass asked for that window
    attn_logit_softcapping       small scores hardly bend some layer handed that cap to attention
    index_topk, ...              every key is chosen      packed attention chooses none: padded rows, the library's way
    logits_soft_cap, ...         small logits hardly bend the head is the model's own code

Masks, sinks, position biases and leaks between rows do show, and are left to the probe (`probe.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

from transformers import PretrainedConfig

WINDOWS = (
    *("sliding_window", "sliding_window_size", "attention_chunk_size", "attention_window_size"),
    *("attention_window", "window_size"),
)
"""Fields with the tokens that a layer of local attention sees."""
SOFTCAPS = ("attn_logit_softcapping",)
"""Fields with a bound on attention scores."""
SPARSE = ("index_topk", "index_topk_blocks", "keep_window_size")
"""Fields with the keys, or blocks of them, that each token chooses among those before it."""
HEAD_SOFTCAPS = ("logits_soft_cap", "output_logit_soft_cap")
"""Fields with a bound on logits that `heads.py` does not put into a matrix."""


def unseen(config: PretrainedConfig, windows: Set[int], softcaps: Set[float]) -> str:
    """Why packed rows may be wrong where short ones are right, with the field; empty where nothing says so.

    windows, softcaps: what masks and layers of the last packed pass asked attention for.
    """
    text = config.get_text_config()
    for field, size in _numbers(text, WINDOWS if _has_local_layers(text) else ()):
        if size not in windows:
            return f"config.json has {field}={size:g}, and no layer asked for attention to that many tokens"
    for field, bound in _numbers(text, SOFTCAPS):
        if bound not in softcaps:
            return f"config.json has {field}={bound:g}, and no layer asked attention for that cap on scores"
    for field, keys in _numbers(text, SPARSE):
        return f"config.json has {field}={keys:g}, and packed attention has no sparse choice of keys"
    return ""


def caps_scores(config: PretrainedConfig) -> bool:
    """Whether attention scores are bounded, which the library's sdpa leaves out."""
    return any(True for _ in _numbers(config.get_text_config(), SOFTCAPS))


def head_cap(config: PretrainedConfig) -> str:
    """Why the head is more than a matrix where small logits do not show it; empty where nothing says so."""
    for field, bound in _numbers(config.get_text_config(), HEAD_SOFTCAPS):
        return f"config.json has {field}={bound:g}"
    return ""


def _has_local_layers(text: PretrainedConfig) -> bool:
    kinds = getattr(text, "layer_types", None)
    local = kinds is None or any(word in kind for kind in kinds for word in ("sliding", "chunk", "local"))
    return local and getattr(text, "use_sliding_window", True) is not False


def _numbers(text: PretrainedConfig, fields: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """(field, number) of those that are set; one that has a number a layer gives each."""
    for field in fields:
        value: Any = getattr(text, field, None)
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool) and number > 0:
                yield field, number
