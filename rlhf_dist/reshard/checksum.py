"""Checksums of parameters that add up over boxes: how two ends of a weight sync know they hold the same bits.

A parameter is a matrix of rows (its last dim) whose bytes are read as words w (64 bit where every box of every
rank starts and ends on a multiple of 8 bytes in the last dim, else 32 or 16):

    checksum = sum over rows r and words c of  a(r) * w[r, c] * b(c)   modulo 2^64

a and b are odd pseudo-random numbers (SplitMix64 of the position). Their product is odd, so a single changed word
changes the sum; it differs from place to place, so exchanging different words does too, but for a chance of about
2^-30. The sum runs over words: ranks add up their own boxes and one all-reduce gives the checksum of the tensor
nobody holds. It is a matrix-vector product, 7 GB/s on one CPU core.

It guards against stale, missing, misplaced and corrupted weights, not against an adversary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import gcd, prod

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.reshard.layout import Box, ParameterLayout

BLOCK_WORDS: dict[str, int] = {"cpu": 1 << 17}
"""Kind of device -> words that are added up at one time. 1 MiB on a CPU stays in its cache."""
DEVICE_BLOCK_WORDS = 1 << 25
"""On any other device, where each block costs some launches: 256 MiB, twice that while it is added up."""

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def word_bytes(*parameters: ParameterLayout) -> int:
    """Bytes of a word so that no word of a parameter lies in two boxes of any of these layouts of it."""
    item = parameters[0].item_bytes
    if not parameters[0].shape:
        return item
    edges = [edge for p in parameters for array in (p.start, p.stop) for edge in np.unique(array[:, -1]).tolist()]
    return _width(item, [parameters[0].shape[-1], *edges])


def full_checksum(tensor: Tensor) -> int:
    """The checksum of a whole parameter in words of one element, so that any boxes add up to it; in [0, 2^64)."""
    box = tuple((0, size) for size in tensor.shape)
    return unsigned(box_checksum(tensor, box, tensor.shape, tensor.element_size()))


def box_checksum(
    tensor: Tensor, box: Box, shape: Sequence[int], width: int, dtype: torch.dtype | None = None
) -> Tensor:
    """What the elements of `box`, cast to `dtype`, add to the checksum of a parameter of `shape`.

    tensor: those elements, any strides. width: bytes of a word. Returns an int64 scalar on its device, to be summed
    (wrapping).
    """
    dtype = dtype or tensor.dtype
    if not tensor.numel():
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    *leading, (first, last) = box or ((0, 1),)
    per_word = width // dtype.itemsize
    row_weights = _row_weights(tuple(leading), tuple(shape), tensor.device)
    column_weights = _column_weights(first // per_word, last // per_word, tensor.device)
    matrix = tensor.detach().reshape(-1, last - first) if tensor.is_contiguous() else tensor.detach()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    columns = last - first
    most = BLOCK_WORDS.get(tensor.device.type, DEVICE_BLOCK_WORDS)
    scratch_words = max(min(most, -(-tensor.numel() // per_word)), len(column_weights))
    scratch = torch.empty(scratch_words, dtype=torch.int64, device=tensor.device)
    at = 0
    for part in _parts(matrix, columns, max(1, most * per_word // columns)):
        words = part.to(dtype).view(_INTEGER[width])
        some = row_weights[at : at + len(words)]
        at += len(words)
        total += (_dot_rows(words, column_weights, scratch) * some).sum()
    return total


def unsigned(total: Tensor | int) -> int:
    """A summed checksum as a number in [0, 2^64)."""
    return int(total) & 0xFFFF_FFFF_FFFF_FFFF


def _width(item: int, edges: Iterable[int]) -> int:
    step = gcd(*edges) * item if edges else item
    return max(width for width in (1, 2, 4, 8) if width <= max(step, item) and max(step, item) % width == 0)


def _parts(tensor: Tensor, columns: int, rows: int) -> Iterable[Tensor]:
    """[at most `rows`, columns] contiguous, together the tensor in order of its leading dims."""
    if tensor.ndim == 2:
        for at in range(0, len(tensor), rows):
            yield tensor[at : at + rows].contiguous()
    elif tensor.ndim < 2:
        yield tensor.reshape(1, -1).contiguous()
    elif tensor.numel() <= rows * columns:
        yield tensor.reshape(-1, columns).contiguous()
    else:
        for inner in tensor.unbind(0):
            yield from _parts(inner, columns, rows)


def _dot_rows(words: Tensor, weights: Tensor, scratch: Tensor) -> Tensor:
    wide = scratch[: words.numel()].view(words.shape)
    if words.dtype == torch.int64:
        # The upper half added to the lower: two words that differ in the last bit alone would exchange unseen,
        # since the difference of two odd weights is even.
        torch.bitwise_right_shift(words, 32, out=wide)
        wide += words
    else:
        wide.copy_(words)
    # Integer matrix products exist on the CPU only.
    return torch.mv(wide, weights) if wide.device.type == "cpu" else (wide * weights).sum(dim=1)


def _row_ids(leading: Sequence[tuple[int, int]], shape: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Flat index over the leading dims of each row of a box."""
    ids = np.zeros(1, np.uint64)
    for k, (start, stop) in enumerate(leading):
        step = np.uint64(prod(shape[k + 1 : -1]))
        ids = (ids[:, None] + np.arange(start, stop, dtype=np.uint64) * step).reshape(-1)
    return ids


@lru_cache(maxsize=1 << 14)
def _row_weights(leading: tuple[tuple[int, int], ...], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Of the rows of a box: made once for all syncs, 8 bytes a row."""
    return _weights(_row_ids(leading, shape), device)


@lru_cache(maxsize=64)
def _column_weights(first: int, last: int, device: torch.device) -> Tensor:
    return _weights(np.arange(first, last, dtype=np.uint64) + np.uint64(1 << 40), device)


def _weights(ids: np.ndarray[tuple[int], np.dtype[np.uint64]], device: torch.device) -> Tensor:
    """Odd 64-bit numbers: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    mixed = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(mixed.view(np.int64)).to(device)
