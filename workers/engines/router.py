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

from workers.engines.packing import Packed


def check_balance(hf: PreTrainedModel) -> None:
    """Raise ValueError for a family that the library has no load-balancing loss for."""
    if not hasattr(sys.modules[type(hf).__module__], "load_balancing_loss_func"):
        raise ValueError(
            f"{type(hf).__name__} has no load-balancing loss in transformers; set engine.router_aux_loss=0"
        )


def balance_of_rows(hf: PreTrainedModel, states: Any, packed: Packed) -> Tensor:
    """[B] the loss of each row's tokens, prompt included, over all layers; `states`: what the trunk returned."""
    if not getattr(states, "router_logits", None):
        raise ValueError(f"{type(hf).__name__} does not give its router's logits; set engine.router_aux_loss=0")
    config = hf.config.get_text_config()
    experts = next(getattr(config, name) for name in ("num_experts", "num_local_experts") if hasattr(config, name))
    loss = sys.modules[type(hf).__module__].load_balancing_loss_func
    layers = [logits.flatten(0, -2) for logits in states.router_logits]
    # In a grid the row's own tokens come first; in a pack rows lie one after the other.
    if packed.way.grid:
        length = packed.input_ids.shape[1]
        rows = [range(k * length, k * length + int(size)) for k, size in enumerate(packed.row_tokens[:, 0].tolist())]
    else:
        ends = packed.packing.ends.tolist()
        rows = [range(start, end) for start, end in zip(ends, ends[1:], strict=False)]
    values = [
        loss(tuple(layer[row.start : row.stop] for layer in layers), experts, config.num_experts_per_tok)
        for row in rows
    ]
    return torch.stack(values).float()
