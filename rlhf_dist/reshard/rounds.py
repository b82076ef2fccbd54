"""One rank's part of the routes: what it copies, and what it sends and receives in which rounds.

Everything that one sender gives to one group of receivers is a *stream*: the pieces laid one after the other in
their order, cut into as many chunks as there are rounds (the last ones may be shorter or none). In a *round* every
rank gives every other at most one message: its chunks of all streams between the two. Both ends derive the same
chunks from the routes, so nothing but elements travels, and no message is told from another by tag or order.

    stream 0 -> {2, 3}    | q_proj piece | o_proj piece | up_proj |piece |
    chunks                |---- 0 ----|---- 1 ----|---- 2 ----|-3-|
    rank 0, round 0       to 2: chunk 0 of stream 0, chunk 0 of stream 1       to 3: chunk 0 of stream 0

Round k+1 is packed while round k travels, so two of each are in memory. There are as few rounds as the bucket
budget allows to the rank that moves most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import numpy as np

from rlhf_dist.reshard.layout import ITEM_BYTES, Box, Ints, Layout, flat_range_boxes
from rlhf_dist.reshard.routes import Routes

IN_FLIGHT = 2
"""Rounds in memory at one time."""
SMALLEST_CHUNK_BYTES = 4096
"""Below this, messages cost more than they carry; a smaller budget is refused."""
ALIGN_BYTES = 16
"""Chunks begin on multiples of it in a message, so that elements of every dtype lie where they may."""
MOST_PEERS = 128
"""Ranks that one rank sends to in a round, and receives from: NCCL groups of more than 256 operations may hang."""


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
    dtype: str
    first_round: int
    """Chunk k travels in round first_round + k."""
    chunks: list[list[Part]]
    chunk_elements: int
    elements: int

    def of_round(self, k: int) -> int | None:
        """The chunk that travels in round k; None: none does."""
        chunk = k - self.first_round
        return chunk if 0 <= chunk < len(self.chunks) else None

    def length(self, chunk: int) -> int:
        """Elements of a chunk."""
        return min(self.chunk_elements, self.elements - chunk * self.chunk_elements)

    def room(self, chunk: int) -> int:
        """Bytes that a chunk takes in a message."""
        return _aligned(self.length(chunk) * ITEM_BYTES[self.dtype])


@dataclass(frozen=True)
class RankRounds:
    """What one rank does."""

    copies: list[tuple[Slice, Slice]]
    """(source, target) inside this process."""
    sends: list[Stream]
    receives: list[Stream]
    rounds: int
    """The same on all ranks, and every rank takes part in each."""
    send_bytes: int
    """Of the largest round's messages to others."""
    receive_bytes: int
    """Of the largest round's messages from others."""

    @property
    def buffer_bytes(self) -> int:
        """Memory that its messages take."""
        return IN_FLIGHT * (self.send_bytes + self.receive_bytes)


class BucketError(ValueError):
    """A bucket budget that no rounds fit."""


def default_bucket_bytes(device: str) -> int:
    """Budget of a device kind: large messages where a link carries 50 GB/s or more, small ones where memory is the
    host's. 64 MiB on 32 GPUs would be 41,000 messages of 425 kB a rank for a 70B model."""
    return 1 << 30 if device == "cuda" else 64 << 20


def rounds_of(routes: Routes, rank: int, bucket_bytes: int, most_peers: int = MOST_PEERS) -> RankRounds:
    """What `rank` does in `routes`, its messages within `bucket_bytes`. Raises BucketError when that is too little."""
    flows = _Flows(routes, most_peers)
    counts = flows.rounds(bucket_bytes)
    first_of = [0, *accumulate(counts)]
    copies: list[tuple[Slice, Slice]] = []
    found: dict[tuple[int, int, str], list[tuple[str, Box]]] = {}
    source, target = _Finder(routes.source, rank), _Finder(routes.target, rank)
    for name, rows, mine in routes.rows_of(rank):
        dtype = routes.target.parameters[name].dtype
        for i in mine.tolist():
            sender, group = int(rows.sender[i]), int(rows.group[i])
            box = tuple(zip(rows.start[i].tolist(), rows.stop[i].tolist(), strict=True))
            if routes.groups[group] == (sender,):
                copies.append((source.slice(name, box), target.slice(name, box)))
            else:
                found.setdefault((sender, group, dtype), []).append((name, box))
    sends: list[Stream] = []
    receives: list[Stream] = []
    for (sender, group, dtype), pieces in sorted(found.items(), key=lambda item: item[0]):
        for window, receivers in windows(sender, routes.groups[group], routes.world, most_peers):
            if rank != sender and rank not in receivers:
                continue
            finder = source if sender == rank else target
            elements = sum(prod(stop - start for start, stop in box) for _, box in pieces)
            size = _chunk_bytes(elements * ITEM_BYTES[dtype], counts[window]) // ITEM_BYTES[dtype]
            chunks = _chunks(pieces, size, finder)
            stream = Stream(sender, receivers, dtype, first_of[window], chunks, size, elements)
            (sends if sender == rank else receives).append(stream)
    rounds = first_of[-1]
    return RankRounds(
        copies, sends, receives, rounds, _largest_round(sends, rounds, None), _largest_round(receives, rounds, 1)
    )


def windows(sender: int, group: Sequence[int], world: int, most_peers: int) -> list[tuple[int, tuple[int, ...]]]:
    """(window, its receivers) of a multicast: a window has rounds of its own, in which every rank sends to at most
    `most_peers` ranks, those behind it, and receives from as many, those before it."""
    if world - 1 <= most_peers:
        return [(0, tuple(group))]
    of: dict[int, list[int]] = {}
    for receiver in group:
        of.setdefault(((receiver - sender) % world - 1) // most_peers, []).append(receiver)
    return [(window, tuple(receivers)) for window, receivers in sorted(of.items())]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


def _chunk_bytes(nbytes: int, rounds: int) -> int:
    return _aligned(-(-nbytes // rounds))


def _largest_round(streams: Sequence[Stream], rounds: int, copies: int | None) -> int:
    """Bytes; copies: of each chunk, None for one to each receiver."""
    total = np.zeros(rounds, np.int64)
    for stream in streams:
        for chunk in range(len(stream.chunks)):
            total[stream.first_round + chunk] += stream.room(chunk) * (copies or len(stream.receivers))
    return int(total.max(initial=0))


def _chunks(pieces: list[tuple[str, Box]], per_chunk: int, finder: _Finder) -> list[list[Part]]:
    chunks: list[list[Part]] = []
    at = 0
    for name, box in pieces:
        for begin, end, sub in _cut(box, at, per_chunk):
            if begin // per_chunk == len(chunks):
                chunks.append([])
            sizes = tuple(stop - start for start, stop in sub)
            chunks[-1].append(Part(begin % per_chunk, sizes, finder.slice(name, sub)))
            at = end
    return chunks


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
        raise AssertionError(f"rank {self._rank} holds no box of {name} around {box}: the routes are of other layouts")


class _Flows:
    """What every rank sends to every other, which is what the number of rounds hangs on."""

    def __init__(self, routes: Routes, most_peers: int) -> None:
        self._world = routes.world
        nbytes = _stream_bytes(routes)
        rows = [
            (sender, size, window, receivers)
            for (sender, group, _), size in nbytes.items()
            for window, receivers in windows(sender, routes.groups[group], routes.world, most_peers)
        ]
        self._sender = np.array([row[0] for row in rows], np.int64)
        self._bytes = np.array([row[1] for row in rows], np.int64)
        self._window = np.array([row[2] for row in rows], np.int64)
        self._fanout = np.array([len(row[3]) for row in rows], np.int64)
        self._receiver = np.array([rank for row in rows for rank in row[3]], np.int64)

    def rounds(self, bucket_bytes: int) -> list[int]:
        """Of each window, the fewest with which no rank's messages exceed the budget."""
        budget = bucket_bytes // IN_FLIGHT
        found = []
        for window in range(int(self._window.max(initial=-1)) + 1):
            ones = np.where(self._window == window, 1, 0)
            most = int(self._load(ones).max())
            if budget < most * SMALLEST_CHUNK_BYTES:
                raise BucketError(
                    f"rollout.bucket_bytes must be at least {IN_FLIGHT * most * SMALLEST_CHUNK_BYTES} for these "
                    f"routes (a rank gives or takes {most} chunks in a round), got {bucket_bytes}"
                )
            count = max(1, -(-int(self._load(self._bytes * ones).max()) // budget))
            # Rounding up to whole elements and multiples of ALIGN_BYTES may take one more, or a few.
            while int(self._load(-(-self._bytes // (count * ALIGN_BYTES)) * ALIGN_BYTES * ones).max()) > budget:
                count += 1
            found.append(count)
        return found

    def _load(self, each: Ints) -> Ints:
        """[world] of something that each stream gives to each of its receivers, what a rank gives and takes."""
        gives = np.bincount(self._sender, each * self._fanout, self._world)
        takes = np.bincount(self._receiver, np.repeat(each, self._fanout), self._world)
        return np.asarray(gives + takes, np.int64)


def _stream_bytes(routes: Routes) -> dict[tuple[int, int, str], int]:
    """(sender, group, dtype) -> bytes that each of its receivers gets; in the order of the streams."""
    alike: dict[tuple[int, str], list[str]] = {}
    for name, rows in routes.transfers.items():
        alike.setdefault((id(rows), routes.target.parameters[name].dtype), []).append(name)
    total: dict[tuple[int, int, str], int] = {}
    for (_, dtype), names in alike.items():
        rows = routes.transfers[names[0]]
        pairs, where = np.unique(rows.sender * len(routes.groups) + rows.group, return_inverse=True)
        size = np.bincount(where.reshape(-1), rows.volume, len(pairs)).astype(np.int64) * ITEM_BYTES[dtype] * len(names)
        for pair, nbytes in zip(pairs.tolist(), size.tolist(), strict=True):
            sender, group = divmod(pair, len(routes.groups))
            if routes.groups[group] != (sender,):
                total[sender, group, dtype] = total.get((sender, group, dtype), 0) + nbytes
    return dict(sorted(total.items()))
