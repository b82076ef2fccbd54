"""Heads of language models: as one matrix where they are that, else the library's own code on hidden states.

matrix    logits = softcap tanh(scale (h W^T + b) / softcap): most families; chunks without autograd (log_probs.py)
library   the model's own forward over a trunk that hands back the hidden states it is given, whatever it does
          after the trunk: norms, dense layers, multipliers, caps
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.engines.model.log_probs import Head
from workers.engines.model.token_split import TokenSplit, summed_gradient

_FACTORS = ("logit_scale", "lm_head_multiplier")
"""Settings of config.json that logits are multiplied with (Cohere, Falcon-H1)."""
_DIVISORS = ("logits_scaling",)
"""Settings that they are divided by (Granite)."""
_SOFTCAP = "final_logit_softcapping"


def trunk_of(hf: PreTrainedModel) -> nn.Module:
    """The part of a model that ends with hidden states; of some families the library takes the whole model for it."""
    if hf.base_model is not hf:
        return cast(nn.Module, hf.base_model)
    models = (child for child in hf.children() if isinstance(child, PreTrainedModel))
    return cast(nn.Module, next(models, hf))


def matrix_head(hf: PreTrainedModel, split: TokenSplit) -> Head | None:
    """The head as a matrix with what the config says about its logits; None for a model whose head is none."""
    layer: Any = hf.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if weight is None:
        return None
    config = hf.config.get_text_config()
    scale = 1.0
    for name in _FACTORS:
        scale *= _number(config, name) or 1.0
    for name in _DIVISORS:
        scale /= _number(config, name) or 1.0
    bias = getattr(layer, "bias", None)
    return Head(
        summed_gradient(weight, split),
        None if bias is None else summed_gradient(bias, split),
        scale,
        _number(config, _SOFTCAP),
    )


def library_logits(hf: PreTrainedModel, states: Any, hidden: Tensor) -> Tensor:
    """[t, H] -> [t, V] by the model's own forward; `states`: what its trunk returned."""
    given = type(states)(last_hidden_state=hidden.unsqueeze(0))
    with _trunk_replaced(hf, _Given(given)):
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        logits: Tensor = hf(input_ids=ids).logits[0]
    return logits


class _Given(nn.Module):
    """A trunk that has run already."""

    def __init__(self, states: Any) -> None:
        super().__init__()
        self._states = states

    def forward(self, *_: Any, **__: Any) -> Any:
        return self._states


@contextmanager
def _trunk_replaced(hf: PreTrainedModel, trunk: nn.Module) -> Iterator[None]:
    original = trunk_of(hf)
    name = next(name for name, child in hf.named_children() if child is original)
    setattr(hf, name, trunk)
    try:
        yield
    finally:
        setattr(hf, name, original)


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
