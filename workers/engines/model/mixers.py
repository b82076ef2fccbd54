"""Layers that carry a state along a row (Mamba, gated delta nets, short convolutions) over packed rows.

    pack   [1, N, H]   | row 0 | row 1 ... | prompt | response | response |
    rows   [S, K, H]   row 0 . .            each with the tokens it sees before it (a shared prompt, once a response),
                       row 1 ...            padded on the right: such layers look back only
                       prompt response
    pack   [1, N, H]   each sequence's own tokens, back in their places

Only the mixing layer sees rows; embeddings, norms, MLPs, experts and the head see the pack. A mixer is found, not
listed: it takes a cache, nothing inside it does, and it does not go through the attention interface (`attention.py`).
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from workers.engines.model.attention import Packing, RowMask

_CACHES = {"cache_params", "past_key_values", "past_key_value", "past_states", "layer_past", "conv_states", "state"}


def mixers_of(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that mix tokens without the attention interface."""
    taking = [module for module in model.modules() if _CACHES & set(inspect.signature(module.forward).parameters)]
    inner = {id(module) for module in taking}
    deepest = [m for m in taking if not any(id(below) in inner for below in m.modules() if below is not m)]
    return [m for m in deepest if m is not model and "ALL_ATTENTION_FUNCTIONS" not in _names(m)]


def mix_by_row(model: nn.Module) -> list[RowMixer]:
    """Make the mixers of `model` see rows of their own in passes over packs, in place."""
    return [RowMixer(mixer) for mixer in mixers_of(model)]


class RowMixer:
    """A mixer's forward, put in its place.

    `packing` is set before a pass and stays until the next one begins: a pass is recomputed (activation checkpointing)
    in its own backward pass, which comes first.
    """

    def __init__(self, mixer: nn.Module) -> None:
        self.packing: Packing | None = None
        """Of the pass that is going on; None where the library's own rows go through."""
        self._forward = mixer.forward
        self.__signature__ = inspect.signature(mixer.forward)
        mixer.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        packing = self.packing
        kwargs.pop("packing", None)
        if packing is None:
            return self._forward(*args, **kwargs)
        if packing.group is not None:
            raise ValueError("layers with a state need whole rows: sequence_parallel must be 1")
        tokens, own = packing.by_row
        unpacked = [_rows(value, tokens, packing.tokens) for value in args]
        named = {name: _rows(value, tokens, packing.tokens) for name, value in kwargs.items()}
        mixed = self._forward(*unpacked, **named)
        if isinstance(mixed, tuple):
            return (_pack(mixed[0], own), *mixed[1:])
        return _pack(mixed, own)


def _rows(value: Any, tokens: Tensor, size: int) -> Any:
    """[1, N, ...] -> [S, K, ...] of states; no mask, as no row has padding before its tokens."""
    if isinstance(value, RowMask):
        return None
    if isinstance(value, tuple):
        return tuple(_rows(part, tokens, size) for part in value)
    if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[:2] == (1, size):
        return value[0][tokens] if value.is_floating_point() else None
    return value


def _pack(states: Tensor, own: Tensor) -> Tensor:
    """[S, K, ...] -> [1, N, ...]."""
    return states.flatten(0, 1)[own].unsqueeze(0)


def _names(module: nn.Module) -> set[str]:
    return set(inspect.unwrap(type(module).forward).__code__.co_names)
