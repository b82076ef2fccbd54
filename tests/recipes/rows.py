"""Small batches for formulas: what a loss sees, and what a host op sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rlhf_dist.algorithms.contract import Loss, ModelOutput, Rows
from rlhf_dist.batch import Batch, Column


def ragged(*rows: Sequence[float], dtype: str = "float32") -> Column:
    """A column with an entry a token."""
    return Column.ragged([np.array(row, dtype) for row in rows], dtype=dtype)


def numbers(*values: float, dtype: str = "float32") -> Column:
    """A column with an entry a row."""
    return Column(np.array(values, dtype))


def masked(*lengths: int) -> Column:
    """A response_mask of which every token counts."""
    return ragged(*([1] * length for length in lengths), dtype="uint8")


def micro_batch(
    columns: Mapping[str, Sequence[Any]], lengths: Sequence[int], groups: Sequence[int] | None = None
) -> Rows:
    """Rows of `lengths` tokens, all of which count; each a group unless it is said."""
    group = torch.tensor(groups if groups is not None else range(len(lengths)))
    return Rows(
        columns={name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()},
        mask=torch.ones(sum(lengths), dtype=torch.float64),
        row_of_token=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        group_of_row=group,
        num_groups=int(group.max()) + 1,
    )


def of_rows(
    loss: Loss,
    log_probs: Sequence[float],
    columns: Mapping[str, Sequence[Any]],
    lengths: Sequence[int],
    groups: Any = None,
) -> list[float]:
    """The loss's values for these log-probs."""
    value, _ = loss(said(log_probs), micro_batch(columns, lengths, groups))
    found: list[float] = value.tolist()
    return found


def gradient(
    loss: Loss,
    log_probs: Sequence[float],
    columns: Mapping[str, Sequence[Any]],
    lengths: Sequence[int],
    groups: Any = None,
) -> list[float]:
    """Of the sum of the loss's values, at the log-probs."""
    model = said(log_probs)
    loss(model, micro_batch(columns, lengths, groups))[0].sum().backward()
    assert model.log_probs is not None and model.log_probs.grad is not None
    found: list[float] = model.log_probs.grad.tolist()
    return found


def said(log_probs: Sequence[float]) -> ModelOutput:
    """What a language model said."""
    return ModelOutput(log_probs=torch.tensor(log_probs, dtype=torch.float64, requires_grad=True))


def values(batch: Batch, name: str) -> list[float]:
    """A column's numbers."""
    found: list[float] = batch[name].values.tolist()
    return found
