"""Checksums of parameters that add up over shards: how two ends of a weight sync know they hold the same bits.

A parameter's bytes are read as words w_0, w_1, ... (32 bit where a row of the tensor is a whole number of
them, else one word an element), and

    checksum = sum_k w_k * (2k + 1)   modulo 2^64        w_k as a signed integer, k over the whole tensor

The weight 2k + 1 is odd, so any single changed word changes the sum; it differs from place to place, so
exchanging two different words does too (their difference is below 2^32, and so is that of the weights, for
tensors of fewer than 2^31 words). The sum runs over elements, so each rank adds up its own rows and one
all-reduce gives the checksum of the tensor nobody holds.

It guards against stale, missing, misplaced and corrupted weights, not against an adversary.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from rlhf_dist.reshard.layout import Box

_WORDS_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Words widened to 64 bits at one time: what stays in a core's cache, or keeps a GPU busy in 64 MiB."""

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def full_checksum(tensor: Tensor) -> int:
    """The checksum of a whole parameter, in [0, 2^64). Extra memory: below 1 MiB on a CPU, 64 MiB on a GPU."""
    return unsigned(rows_checksum(tensor, first_row=0, shape=tensor.shape))


def rows_checksum(rows: Tensor, *, first_row: int, shape: Sequence[int]) -> Tensor:
    """What rows [first_row, first_row + len(rows)) of a parameter of `shape` add to its checksum.

    Returns an int64 scalar on the rows' device, to be summed over shards (wrapping) and read by `unsigned`.
    """
    if rows.ndim and tuple(rows.shape[1:]) != tuple(shape[1:]):
        raise ValueError(f"rows must have the parameter's trailing shape {tuple(shape[1:])}, got {tuple(rows.shape)}")
    row_bytes = prod(shape[1:]) * rows.element_size()
    width = 4 if row_bytes % 4 == 0 else rows.element_size()
    words = rows.detach().contiguous().view(-1).view(_INTEGER[width])
    return _words_checksum(words, first_row * row_bytes // width)


def box_checksum(part: Tensor, box: Box, shape: Sequence[int]) -> Tensor:
    """What a box of a parameter of `shape` adds to its checksum; `part` has the box's shape.

    Returns an int64 scalar as `rows_checksum` does. Boxes that are not whole rows cost about four times as much:
    their words do not lie side by side.
    """
    if not shape or all((start, stop) == (0, size) for (start, stop), size in zip(box[1:], shape[1:], strict=True)):
        return rows_checksum(part, first_row=box[0][0] if box else 0, shape=shape)
    halves = 4 // part.element_size() if prod(shape[1:]) * part.element_size() % 4 == 0 else 1
    bits = 8 * part.element_size()
    integers = part.detach().contiguous().view(_INTEGER[part.element_size()])
    index = torch.zeros((1,) * len(shape), dtype=torch.int64, device=part.device)
    for dim, (start, stop) in enumerate(box):
        places = torch.arange(start, stop, device=part.device) * prod(shape[dim + 1 :])
        index = index + places.view([-1 if d == dim else 1 for d in range(len(shape))])
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    rows = max(1, _WORDS_AT_ONCE.get(part.device.type, 1 << 20) // max(prod(part.shape[1:]), 1))
    for first in range(0, len(part), rows):
        at, wide = index[first : first + rows], integers[first : first + rows].to(torch.int64)
        if halves > 1:
            # A 32-bit word is low half + 2^bits * high half; only the high one carries the sign.
            low = at % halves != halves - 1
            wide = torch.where(low, wide & ((1 << bits) - 1), wide) << (bits * (at % halves))
        total += (wide * (2 * (at // halves) + 1)).sum()
    return total


def unsigned(total: Tensor | int) -> int:
    """A summed checksum as a number in [0, 2^64)."""
    return int(total) & 0xFFFF_FFFF_FFFF_FFFF


def _words_checksum(words: Tensor, first: int) -> Tensor:
    size = min(_WORDS_AT_ONCE.get(words.device.type, 1 << 20), max(len(words), 1))
    odd = 2 * torch.arange(size, dtype=torch.int64, device=words.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), size):
        wide = words[start : start + size].to(torch.int64)
        # w * (2(start + i) + 1) = w * (2i + 1) + 2 start * w: one table of weights serves every chunk.
        total += (wide * odd[: len(wide)]).sum() + wide.sum() * (2 * (first + start))
    return total
