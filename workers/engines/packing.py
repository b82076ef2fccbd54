"""Rows to packed micro-batches: which rows share a forward pass, and the tensors of one pass.

rows       prompt p p p | response r r        prompt p | response r r r
input_ids  p p p r r p r r r                  one row of N tokens, no padding
before     . . ^ ^ . ^ ^ ^ .                  token j of a response is predicted from the position before it
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlhf_dist.algorithms.contract import Rows
from rlhf_dist.batch import Batch, Column, IntArray
from workers.engines.attention import Packing


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The tensors of one forward pass. N: prompt and response tokens, T: response tokens, B: rows."""

    input_ids: Tensor
    """[1, N] int64."""
    position_ids: Tensor
    """[1, N] int64, from 0 in each row."""
    packing: Packing
    before_token: Tensor
    """[T] int64; the position each response token is predicted from."""
    targets: Tensor
    """[T] int64; the response tokens."""
    last_token: Tensor
    """[B] int64; the position of each row's last token."""


def pack(batch: Batch, device: torch.device) -> Packed:
    """All rows of `batch` as one pass; rows should come in order of length (`micro_batches` sees to it).

    Raises ValueError for a row without a prompt: its first token would have nothing to be predicted from.
    """
    prompts, responses = batch["prompt_ids"], batch["response_ids"]
    prompt_lengths, response_lengths = prompts.lengths, responses.lengths
    if np.any(prompt_lengths < 1):
        raise ValueError(f"every prompt must have at least one token, row {int(np.argmin(prompt_lengths))} has none")
    lengths = prompt_lengths + response_lengths
    ends = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.empty(ends[-1], dtype=np.int64)
    ids[_within(ends[:-1], prompt_lengths)] = prompts.values
    response_at = _within(ends[:-1] + prompt_lengths, response_lengths)
    ids[response_at] = responses.values

    def move(array: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return Packed(
        input_ids=move(ids).unsqueeze(0),
        position_ids=move(_within(np.zeros_like(lengths), lengths)).unsqueeze(0),
        packing=Packing.of(lengths.tolist(), device),
        before_token=move(response_at - 1),
        targets=move(ids[response_at]),
        last_token=move(ends[1:] - 1),
    )


def rows_of(batch: Batch, reads: Iterable[str], device: torch.device) -> Rows:
    """The columns a loss reads, as tensors in the order of the pack.

    Floats become float32, integers int64. Raises TypeError for text and ValueError for a ragged column
    that is not aligned with the response.
    """
    lengths = batch["response_ids"].lengths
    columns = {name: _tensor(name, batch[name], lengths, device) for name in reads}
    _, groups = np.unique(batch["group_id"].values, return_inverse=True)
    return Rows(
        columns=columns,
        mask=_tensor("response_mask", batch["response_mask"], lengths, device).float(),
        row_of_token=torch.from_numpy(np.repeat(np.arange(batch.num_rows), lengths)).to(device),
        group_of_row=torch.from_numpy(groups.astype(np.int64)).to(device),
        num_groups=int(groups.max()) + 1 if len(groups) else 0,
    )


def micro_batches(batch: Batch, budget_tokens: int, *, whole_groups: bool) -> list[IntArray]:
    """Rows cut into passes of at most `budget_tokens` tokens, longest first (first-fit decreasing).

    `whole_groups` keeps rows of one `group_id` together. A row (or group) above the budget gets a pass of
    its own. Within a pass rows are in order of length, which is what packed attention likes.
    """
    if budget_tokens < 1:
        raise ValueError(f"micro_batch_tokens must be >= 1, got {budget_tokens}; it is tokens per forward pass")
    lengths = batch["prompt_ids"].lengths + batch["response_ids"].lengths
    units = batch.group() if whole_groups else [np.array([row]) for row in range(batch.num_rows)]
    sizes = [int(lengths[unit].sum()) for unit in units]
    passes: list[list[IntArray]] = []
    room: list[int] = []
    for k in sorted(range(len(units)), key=lambda k: -sizes[k]):
        fit = next((p for p, free in enumerate(room) if sizes[k] <= free), None)
        if fit is None:
            passes.append([])
            room.append(budget_tokens)
            fit = len(passes) - 1
        passes[fit].append(units[k])
        room[fit] -= sizes[k]
    merged = [np.sort(np.concatenate(units)) for units in passes]
    return [rows[np.argsort(lengths[rows], kind="stable")] for rows in merged]


def filler() -> Batch:
    """One row that counts nowhere, for a rank that has fewer passes than another: collectives need all ranks."""
    return Batch.of(prompt_ids=[np.zeros(1, np.int32)], response_ids=[np.zeros(1, np.int32)])


def _within(starts: IntArray, lengths: IntArray) -> IntArray:
    """start, start + 1, ... of each row, one row after the other."""
    before = np.cumsum(lengths) - lengths
    positions: IntArray = np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
    return positions


def _tensor(name: str, column: Column, lengths: IntArray, device: torch.device) -> Tensor:
    if column.text:
        raise TypeError(f"a loss cannot read the text column {name!r}")
    if column.offsets is not None and not np.array_equal(column.lengths, lengths):
        raise ValueError(f"a loss reads columns with one entry per row or per response token; {name!r} has neither")
    floating = np.issubdtype(column.values.dtype, np.floating)
    # astype copies: arrays from the object store are read-only, and torch wants to own what it is given.
    return torch.from_numpy(column.values.astype(np.float32 if floating else np.int64)).to(device)
