"""One rank's part of a plan: what it copies, and what it sends and receives in which chunks.

Everything that one sender gives to one group of receivers is a *stream*: the pieces laid one after the other in
plan order, cut into chunks of equal size (the last one shorter). Both ends derive the same chunks from the plan,
so nothing but elements travels: no headers, no message per parameter.

    stream 0 -> {2, 3}    | q_proj piece | o_proj piece | up_proj |piece |
    chunks                |---- 0 ----|---- 1 ----|---- 2 ----|-3-|

Chunk k+1 of every stream is packed while chunk k travels, so two of each are in memory. The chunk size is the same
everywhere: the bucket budget over two chunks of each stream, at the rank that takes part in most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from rlhf_dist.reshard.layout import ITEM_BYTES, Box, Ints, Layout, flat_range_boxes
from rlhf_dist.reshard.plan import Plan

IN_FLIGHT = 2
"""Chunks of a stream in memory at one time."""
SMALLEST_CHUNK_BYTES = 4096
"""Below this, messages cost more than they carry; a smaller budget is refused."""


@dataclass(frozen=True)
class Slice:
    """Elements of one shard."""

    name: str
    shard: int
    """Index into shards[name]."""
    where: tuple[slice, ...]


@dataclass(frozen=True)
class Part:
    """Where some elements lie in a chunk."""

    at: int
    """First element in the chunk."""
    size: tuple[int, ...]
    slice: Slice


@dataclass(frozen=True)
class Stream:
    """What one sender gives to one group of receivers, as one of them sees it."""

    sender: int
    receivers: tuple[int, ...]
    tag: int
    """Tells apart the streams of one sender."""
    dtype: str
    chunks: list[list[Part]]
    chunk_elements: int
    elements: int

    def length(self, k: int) -> int:
        """Elements of chunk k."""
        return min(self.chunk_elements, self.elements - k * self.chunk_elements)


@dataclass(frozen=True)
class RankSchedule:
    """What one rank does."""

    copies: list[tuple[Slice, Slice]]
    """(source, target) inside this process."""
    sends: list[Stream]
    receives: list[Stream]
    buffer_bytes: int
    """Most memory that its chunks take."""


class BucketError(ValueError):
    """A bucket budget that no schedule fits."""


def chunk_bytes(plan: Plan, bucket_bytes: int) -> int:
    """Bytes of a chunk so that no rank's chunks exceed `bucket_bytes`. Raises BucketError when that is too little."""
    most = int(_streams_per_rank(plan).max(initial=0))
    if not most:
        return max(bucket_bytes, SMALLEST_CHUNK_BYTES)
    chunk = bucket_bytes // (IN_FLIGHT * most) // 8 * 8
    if chunk < SMALLEST_CHUNK_BYTES:
        raise BucketError(
            f"rollout.bucket_bytes must be at least {IN_FLIGHT * most * SMALLEST_CHUNK_BYTES} for this plan (a rank "
            f"takes part in {most} streams), got {bucket_bytes}"
        )
    return chunk


def schedule(plan: Plan, rank: int, bucket_bytes: int) -> RankSchedule:
    """What `rank` does in `plan`, its chunk buffers within `bucket_bytes`."""
    size = chunk_bytes(plan, bucket_bytes)
    copies: list[tuple[Slice, Slice]] = []
    found: dict[tuple[int, int, str], list[tuple[str, Box]]] = {}
    source, target = _Finder(plan.source, rank), _Finder(plan.target, rank)
    for name, rows, mine in plan.rows_of(rank):
        dtype = plan.target.parameters[name].dtype
        for i in mine.tolist():
            sender, group = int(rows.sender[i]), int(rows.group[i])
            box = tuple(zip(rows.start[i].tolist(), rows.stop[i].tolist(), strict=True))
            if plan.groups[group] == (sender,):
                copies.append((source.slice(name, box), target.slice(name, box)))
            else:
                found.setdefault((sender, group, dtype), []).append((name, box))
    sends: list[Stream] = []
    receives: list[Stream] = []
    for (sender, group, dtype), pieces in sorted(found.items(), key=lambda item: item[0]):
        finder = source if sender == rank else target
        tag = group * len(ITEM_BYTES) + list(ITEM_BYTES).index(dtype)
        stream = _stream(sender, plan.groups[group], tag, dtype, pieces, size, finder)
        (sends if sender == rank else receives).append(stream)
    held = sum(
        min(len(s.chunks), IN_FLIGHT) * min(s.chunk_elements, s.elements) * ITEM_BYTES[s.dtype]
        for s in (*sends, *receives)
    )
    return RankSchedule(copies, sends, receives, held)


def _stream(
    sender: int,
    receivers: tuple[int, ...],
    tag: int,
    dtype: str,
    pieces: list[tuple[str, Box]],
    size: int,
    finder: _Finder,
) -> Stream:
    per_chunk = size // ITEM_BYTES[dtype]
    chunks: list[list[Part]] = []
    at = 0
    for name, box in pieces:
        for begin, end, sub in _cut(box, at, per_chunk):
            if begin // per_chunk == len(chunks):
                chunks.append([])
            sizes = tuple(stop - start for start, stop in sub)
            chunks[-1].append(Part(begin % per_chunk, sizes, finder.slice(name, sub)))
            at = end
    return Stream(sender, receivers, tag, dtype, chunks, per_chunk, at)


def _cut(box: Box, at: int, per_chunk: int) -> Iterator[tuple[int, int, Box]]:
    """Parts of a piece that starts at element `at` of its stream, none across a chunk's end: (begin, end, box)."""
    sizes = [stop - start for start, stop in box]
    end = at + prod(sizes)
    begin = at
    while begin < end:
        until = min(end, (begin // per_chunk + 1) * per_chunk)
        for sub in flat_range_boxes(sizes, begin - at, until - at):
            shifted = tuple((a + o, b + o) for (a, b), (o, _) in zip(sub, box, strict=True))
            volume = prod(b - a for a, b in sub)
            yield begin, begin + volume, shifted
            begin += volume


class _Finder:
    """Finds the shard of one rank that holds a box."""

    def __init__(self, layout: Layout, rank: int) -> None:
        self._layout, self._rank = layout, rank
        self._boxes: dict[str, list[Box]] = {}

    def slice(self, name: str, box: Box) -> Slice:
        if name not in self._boxes:
            self._boxes[name] = self._layout.parameters[name].boxes_of(self._rank)
        for k, held in enumerate(self._boxes[name]):
            if all(a <= start and stop <= b for (start, stop), (a, b) in zip(box, held, strict=True)):
                where = tuple(slice(start - a, stop - a) for (start, stop), (a, _) in zip(box, held, strict=True))
                return Slice(name, k, where)
        raise AssertionError(f"rank {self._rank} holds no box of {name} around {box}: the plan is of other layouts")


def _streams_per_rank(plan: Plan) -> Ints:
    pairs: set[tuple[int, int, str]] = set()
    seen: set[tuple[int, str]] = set()
    for name, rows in plan.transfers.items():
        dtype = plan.target.parameters[name].dtype
        if (id(rows), dtype) not in seen:
            seen.add((id(rows), dtype))
            unique = np.unique(np.stack([rows.sender, rows.group], axis=1), axis=0).tolist()
            pairs.update((sender, group, dtype) for sender, group in unique)
    count = np.zeros(plan.world, np.int64)
    for sender, group, _ in pairs:
        if plan.groups[group] != (sender,):
            count[sender] += 1
            count[list(plan.groups[group])] += 1
    return count
