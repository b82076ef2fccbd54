"""Rows to packed micro-batches: which rows share a forward pass, and the tensors of one pass.

rows       prompt p p p | response r r        prompt p | response r r r
input_ids  p p p r r p r r r                  one row of N tokens, no padding
before     . . ^ ^ . ^ ^ ^ .                  token j of a response is predicted from the position before it
padded     p p p r r p r r r .                every row as long as the longest: what packing saves, kept to compare
shared     p p p r r r r r                    what rows begin with once (prefixes.py), what follows sees it and itself
grid       p p p r r . | p r r r . .          [B, L], for models that only the library's own masks keep exact

With sequence parallelism a rank has a piece of the N tokens, and the outputs at its own positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlhf_dist.algorithms.contract import Rows
from rlhf_dist.batch import Batch, Column, IntArray
from rlhf_dist.dispatch import balance
from workers.engines.model.attention import Packing, Prefix
from workers.engines.model.prefixes import Places, shared_places
from workers.engines.model.token_split import WHOLE, TokenSplit
from workers.engines.model.ways import PACKED, Way


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The tensors of one forward pass of one rank. n: its prompt and response tokens, t: response tokens, b: rows.

    Without a token split they are those of the whole pack: n = N, t = T, b = B.
    """

    way: Way
    """How these rows go through the model."""
    input_ids: Tensor
    """[1, n] int64; in a grid [B, L], n = B L in all that follows."""
    position_ids: Tensor
    """The same shape, from 0 in each row."""
    row_tokens: Tensor
    """The same shape: tokens of the row that each token belongs to; 1 where it is no row's."""
    packing: Packing
    """Of the whole pack, N tokens."""
    before_token: Tensor
    """[t] int64; the position in the rank's piece that each response token is predicted from."""
    targets: Tensor
    """[t] int64; the response tokens."""
    last_token: Tensor
    """[b] int64; the position of each row's last token."""
    split: TokenSplit
    response_tokens: Tensor
    """[B] int64; of each row of the whole pack."""
    token_counts: tuple[int, ...]
    """t of each rank of the split."""
    row_counts: tuple[int, ...]
    """b of each rank of the split."""
    padding: int
    """Tokens of the pack that are no row's."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """[t, ...] what outputs are made of besides the tokens (`outputs.columns_for`)."""
    trial: bool = False
    """The model may fail (`RoleModel.failure`): whether it does is the question."""

    @property
    def mask(self) -> Tensor:
        """Like input_ids: 1 at tokens of rows; 1 everywhere in a pack."""
        return (self.position_ids < self.row_tokens).long() if self.way.grid else torch.ones_like(self.input_ids)


def pack(
    batch: Batch,
    device: torch.device,
    *,
    way: Way = PACKED,
    pad_to: int = 0,
    split: TokenSplit = WHOLE,
    columns: Iterable[str] = (),
) -> Packed:
    """All rows of `batch` as one pass; rows should come in order of length (`micro_batches` sees to it).

    `pad_to`: length that every row is padded to; 0 for no padding, in a grid the longest row's. Prompts are shared as
    `way` says, without padding. `columns`: those that the model needs, where the batch has them. Raises ValueError for
    a row without a prompt: its first token would have nothing to be predicted from.
    """
    prompts, responses = batch["prompt_ids"], batch["response_ids"]
    if np.any(prompts.lengths < 1):
        raise ValueError(f"every prompt must have at least one token, row {int(np.argmin(prompts.lengths))} has none")
    if way.grid:
        pad_to = max(pad_to, longest_row(batch))
    places = shared_places(batch) if way.shares and not pad_to else _places(batch, pad_to, split.sequence)
    total = sum(length for length, _ in places.sequences)
    # What nobody reads is a real token: states of the padding token may be zero, where norms have no gradient.
    ids = np.full(total, prompts.values[0], dtype=np.int64)
    positions, row_tokens = np.zeros_like(ids), np.ones_like(ids)
    row_lengths = prompts.lengths + responses.lengths
    starts = np.cumsum(row_lengths) - row_lengths
    of_prompt = np.zeros(len(places.tokens), dtype=bool)
    of_prompt[_within(starts, prompts.lengths)] = True
    ids[places.tokens[of_prompt]], ids[places.tokens[~of_prompt]] = prompts.values, responses.values
    positions[places.tokens] = _within(np.zeros_like(row_lengths), row_lengths)
    row_tokens[places.tokens] = np.repeat(row_lengths, row_lengths)
    if way.grid:
        positions = np.tile(np.arange(pad_to), batch.num_rows)
        row_tokens = np.repeat(row_lengths, pad_to)
    before = places.tokens[np.flatnonzero(~of_prompt) - 1]
    last = places.tokens[starts + row_lengths - 1]
    piece = total // split.sequence
    first = split.rank // split.tensor * piece
    tokens, token_counts = _share(before, piece, split)
    rows, row_counts = _share(last, piece, split)

    def move(array: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def grid(array: npt.NDArray[np.int64]) -> Tensor:
        return move(array[first : first + piece]).view(batch.num_rows if way.grid else 1, -1)

    return Packed(
        way=way,
        input_ids=grid(ids),
        position_ids=grid(positions),
        row_tokens=grid(row_tokens),
        packing=Packing.of(places.sequences, device, split.sequence_group),
        before_token=move(before[tokens] - first),
        targets=move(responses.values[tokens].astype(np.int64)),
        last_token=move(last[rows] - first),
        split=split,
        response_tokens=move(responses.lengths.astype(np.int64)),
        token_counts=token_counts,
        row_counts=row_counts,
        padding=places.padding,
        columns={
            name: _tensor(name, batch[name], responses.lengths, device, tokens) for name in columns if name in batch
        },
    )


def _places(batch: Batch, pad_to: int, pieces: int) -> Places:
    """Each row by itself, padded to `pad_to`; a number of tokens that `pieces` divides."""
    tokens = batch["prompt_ids"].lengths + batch["response_ids"].lengths
    lengths = np.maximum(tokens, pad_to)
    starts = np.cumsum(lengths) - lengths
    sequences: list[tuple[int, Prefix]] = [(int(length), ()) for length in lengths]
    left = -int(lengths.sum()) % pieces
    if left:  # equal pieces: a sequence that nobody reads fills the last one
        sequences.append((left, ()))
    return Places(_within(starts, tokens), sequences, int((lengths - tokens).sum()) + left)


def _share(positions: IntArray, piece: int, split: TokenSplit) -> tuple[IntArray, tuple[int, ...]]:
    """Which of the positions are this rank's, and every rank's count: by piece of the tokens, then in even parts."""
    parts: list[IntArray] = []
    for rank in range(split.sequence):
        inside = np.flatnonzero((positions >= rank * piece) & (positions < (rank + 1) * piece))
        parts += np.array_split(inside, split.tensor)
    return parts[split.rank], tuple(len(part) for part in parts)


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


def longest_row(batch: Batch) -> int:
    """Prompt and response tokens of the longest row; 0 for none."""
    return int((batch["prompt_ids"].lengths + batch["response_ids"].lengths).max()) if batch.num_rows else 0


def micro_batches(
    batch: Batch, budget_tokens: int, *, whole_groups: bool, pad_to: int = 0, passes: int = 0
) -> list[IntArray]:
    """Rows cut into passes of at most `budget_tokens` tokens, longest first (first-fit decreasing).

    `whole_groups` keeps rows of one `group_id` together. A row (or group) above the budget gets a pass of
    its own. Within a pass rows are in order of length, which is what packed attention likes. `pad_to`: length
    that each row will be padded to. `passes`: cut into that many even ones instead where the budget allows, so
    that ranks that wait for each other have about equal work in each.
    """
    if budget_tokens < 1:
        raise ValueError(f"micro_batch_tokens must be >= 1, got {budget_tokens}; it is tokens per forward pass")
    lengths = np.maximum(batch["prompt_ids"].lengths + batch["response_ids"].lengths, pad_to)
    units = batch.group() if whole_groups else [np.array([row]) for row in range(batch.num_rows)]
    sizes = [int(lengths[unit].sum()) for unit in units]
    cut = _first_fit(sizes, budget_tokens)
    if passes > len(cut):
        even = [part.tolist() for part in balance(sizes, passes) if len(part)]
        largest = max(sum(sizes[k] for k in part) for part in even)
        if largest <= max(budget_tokens, *sizes):
            cut = sorted(even, key=lambda part: -sum(sizes[k] for k in part))
    merged = [np.sort(np.concatenate([units[k] for k in part])) for part in cut]
    return [rows[np.argsort(lengths[rows], kind="stable")] for rows in merged]


def _first_fit(sizes: list[int], budget: int) -> list[list[int]]:
    passes: list[list[int]] = []
    room: list[int] = []
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        fit = next((p for p, free in enumerate(room) if sizes[k] <= free), None)
        if fit is None:
            passes.append([])
            room.append(budget)
            fit = len(passes) - 1
        passes[fit].append(k)
        room[fit] -= sizes[k]
    return passes


def filler(token: int = 0) -> Batch:
    """One row of `token` that counts nowhere, for a rank that has fewer passes than another: collectives need all."""
    row = [np.full(1, token, np.int32)]
    return Batch.of(prompt_ids=row, response_ids=row)


def _within(starts: IntArray, lengths: IntArray) -> IntArray:
    """start, start + 1, ... of each row, one row after the other."""
    before = np.cumsum(lengths) - lengths
    positions: IntArray = np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
    return positions


def _tensor(
    name: str, column: Column, lengths: IntArray, device: torch.device, taken: IntArray | None = None
) -> Tensor:
    """taken: entries of it; None for all."""
    if column.text:
        raise TypeError(f"a loss cannot read the text column {name!r}")
    if column.offsets is not None and not np.array_equal(column.lengths, lengths):
        raise ValueError(f"a loss reads columns with one entry per row or per response token; {name!r} has neither")
    floating = np.issubdtype(column.values.dtype, np.floating)
    # astype copies: arrays from the object store are read-only, and torch wants to own what it is given.
    values = column.values if taken is None else column.values[taken]
    return torch.from_numpy(values.astype(np.float32 if floating else np.int64)).to(device)
