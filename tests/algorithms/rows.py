"""Micro-batches of rows for loss tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf_dist.algorithms import ModelOutput, Rows


def make_rows(lengths: Sequence[int], groups: Sequence[int], mask: Tensor, columns: Mapping[str, Tensor]) -> Rows:
    """Rows with these lengths and group numbers (any integers)."""
    _, group_of_row = torch.unique(torch.tensor(groups, dtype=torch.long), return_inverse=True)
    return Rows(
        columns=columns,
        mask=mask,
        row_of_token=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long)),
        group_of_row=group_of_row,
        num_groups=len(set(groups)),
    )


def tokens(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def model(**outputs: Tensor) -> ModelOutput:
    return ModelOutput(**outputs)
