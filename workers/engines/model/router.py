"""The auxiliary loss of a mixture of experts: the library's own load-balancing loss, of each row, averaged over rows.

The library computes it over whatever lies in one forward pass, so it would depend on how a batch is cut. Of each row
by itself (as DeepSeek-V3 balances sequences, arXiv 2412.19437, eq. 17) it is a sum over rows like any other loss here.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_dist.config import EngineConfig
from workers.engines.model.packing import Packed


def check_balance(hf: PreTrainedModel, engine: EngineConfig) -> None:
    """Raise ValueError for a family that the library has no such loss for, or an engine that cannot use it."""
    if not hasattr(sys.modules[type(hf).__module__], "load_balancing_loss_func") or _experts(hf) is None:
        raise ValueError(
            f"{type(hf).__name__} has no load-balancing loss in transformers; set engine.router_aux_loss=0"
        )
    if engine.name == "deepspeed" and engine.activation_checkpointing:
        raise ValueError(
            "engine.router_aux_loss has no gradient where DeepSpeed recomputes activations; set "
            "engine.activation_checkpointing=false, engine.name=fsdp or engine.router_aux_loss=0"
        )


def balance_of_rows(hf: PreTrainedModel, states: Any, packed: Packed) -> Tensor:
    """[B] the loss of each row's tokens, prompt included, over all layers; `states`: what the trunk returned."""
    if not getattr(states, "router_logits", None):
        raise ValueError(f"{type(hf).__name__} does not give its router's logits; set engine.router_aux_loss=0")
    experts = _experts(hf)
    assert experts is not None, "check_balance has looked"
    loss = sys.modules[type(hf).__module__].load_balancing_loss_func
    layers = [logits.flatten(0, -2) for logits in states.router_logits]
    starts = packed.packing.ends[:-1].long()
    sizes = packed.row_tokens.flatten()[starts].tolist()  # Without what a row is padded with.
    rows = [slice(start, start + size) for start, size in zip(starts.tolist(), sizes, strict=True)]
    return torch.stack([loss(tuple(layer[row] for layer in layers), *experts) for row in rows]).float()


def _experts(hf: PreTrainedModel) -> tuple[int, int] | None:
    """Experts, and how many a token has; None where config.json does not say."""
    config = hf.config.get_text_config()
    counts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
    experts, chosen = next((count for count in counts if count), None), getattr(config, "num_experts_per_tok", None)
    return (experts, chosen) if experts and chosen else None
