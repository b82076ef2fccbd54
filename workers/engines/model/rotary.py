"""Rotary frequencies that depend on the length of the row: longrope (Phi-3, Phi-4) and dynamic NTK.

The library takes the largest position of a forward pass for the length, so a short row would change with its
neighbours, and with dynamic NTK with the longest row ever seen. Here each row has the frequencies of its own length:
rows up to `limit` tokens share theirs; with longrope the longer rows do too, with dynamic NTK each length has its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_rows: list[Tensor] = []
"""[B, n] int64 of the forward pass that is going on: tokens of the row that each token belongs to."""


class row_lengths:
    """Inside, rotary embeddings know the tokens of each row: [B, n]; None where every pass is one row."""

    def __init__(self, lengths: Tensor | None) -> None:
        self._lengths = lengths

    def __enter__(self) -> None:
        if self._lengths is not None:
            _rows.append(self._lengths)

    def __exit__(self, *_: object) -> None:
        if self._lengths is not None:
            _rows.pop()


def rotate_by_row(model: nn.Module) -> int | None:
    """Make such embeddings of `model` read `row_lengths`, in place; tokens up to which none depends on them."""
    limits = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        found = {k for k in (kinds.values() if isinstance(kinds, dict) else [kinds]) if isinstance(k, str)}
        if "longrope" in found or any("dynamic" in kind for kind in found):
            by_row = _ByRow(module)
            limits.append(by_row.limit)
            module.forward = by_row
    return min(limits, default=None)


class _ByRow:
    def __init__(self, module: Any) -> None:
        self._module, self._forward = module, module.forward
        self._dynamic = "longrope" not in str(module.rope_type)
        scaling = module.config.rope_parameters
        nested = [value for value in scaling.values() if isinstance(value, dict)] or [scaling]
        long = [one["original_max_position_embeddings"] for one in nested if one.get("rope_type") == "longrope"]
        self.limit = int(module.config.max_position_embeddings if self._dynamic else min(long))

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        lengths = _rows[-1] if _rows else None
        if lengths is None:
            self._reset()
            found: tuple[Tensor, Tensor] = self._forward(x, position_ids, *args, **kwargs)
            return found
        kinds = torch.where(lengths <= self.limit, 0, lengths if self._dynamic else 1)
        positions = torch.minimum(position_ids.expand_as(lengths), lengths - 1)
        cosine = sine = torch.zeros(())
        for number, kind in enumerate(kinds.unique().tolist()):
            self._reset()
            mine = kinds == kind
            # The library goes by the largest position there is, and a rank may have the beginning of a row only.
            largest = 0 if kind == 0 else kind - 1 if self._dynamic else self.limit
            last = torch.full_like(positions[..., :1], largest)
            found = self._forward(x, torch.cat([torch.where(mine, positions, 0), last], dim=-1), *args, **kwargs)
            cos, sin = (part[..., :-1, :] for part in found)
            cosine = torch.where(mine[..., None], cos, cosine) if number else cos
            sine = torch.where(mine[..., None], sin, sine) if number else sin
        return cosine, sine

    def _reset(self) -> None:
        """Forget the longest row seen: dynamic frequencies would stay those of it."""
        module = self._module
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, module.original_max_seq_len)
        for name, original in list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                module.register_buffer(name.replace("original_", ""), original, persistent=False)
