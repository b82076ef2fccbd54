"""Carries out one rank's rounds: copies inside the process, rounds of messages between all.

packed, started     0   1 | 2 ...       round k+1 is packed and on its way while round k arrives
arrived, unpacked       0 | 1 ...       two rounds in memory

A round is one all-to-all, on every device. What it does depends neither on tags nor on who posts first: every rank
takes part in every round, with nothing to say where it has nothing to say.

To a rank that sees this one's buffers (shared.py) a chunk does not travel: words tell where it lies.

one rank        pack k+1   start k+1   unpack k   swap words ──> all have packed k+1, all have unpacked k
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_dist.reshard.layout import ITEM_BYTES
from rlhf_dist.reshard.rounds import IN_FLIGHT, Part, RankRounds, Slice, Stream
from rlhf_dist.reshard.shards import Shards
from workers.reshard.link import Link
from workers.reshard.shared import SharedBuffer, open_buffer

_DTYPES = {name: getattr(torch, name) for name in ITEM_BYTES}


def exchange(mine: RankRounds, source: Shards, target: Shards, link: Link | None) -> int:
    """Fill the target shards from the source shards of all ranks; returns bytes received from others.

    Values are cast to the target's dtype before they travel. `link` None: only for rounds without streams.
    Raises SyncStopped naming phase, ranks and parameters.
    """
    if link is None:
        assert not mine.sends and not mine.receives, "rounds that send need a link"
        _copy(mine, source, target)
        return 0
    link.phase = "exchange"
    rounds = _Rounds(mine, link) if mine.rounds else None
    for k in range(mine.rounds + 1):
        if rounds and k < mine.rounds:
            rounds.start(k, source)
        if k == 0:
            _copy(mine, source, target)  # while the first round travels
        elif rounds:
            rounds.finish(k - 1, target)
        if rounds and k < mine.rounds:
            rounds.swap()
    return sum(stream.elements * ITEM_BYTES[stream.dtype] for stream in mine.receives)


class _Rounds:
    """The rounds of one exchange, and the memory they go through."""

    def __init__(self, mine: RankRounds, link: Link) -> None:
        self._rounds, self._link = mine, link
        to: dict[int, list[Stream]] = {}
        self._from: dict[int, list[Stream]] = {}
        for stream in mine.sends:
            for peer in stream.receivers:
                to.setdefault(peer, []).append(stream)
        for stream in mine.receives:
            self._from.setdefault(stream.sender, []).append(stream)
        # What travels lies in front, in the order of ranks: an all-to-all knows lengths only.
        self._to = dict(sorted(to.items(), key=lambda item: (link.shares_with(item[0]), item[0])))
        device = link.buffer_device
        self._shared: list[SharedBuffer] = []
        self._theirs: dict[int, list[Tensor]] = {}
        if link.any_shares:
            self._shared = [SharedBuffer(mine.send_bytes) for _ in range(IN_FLIGHT)]
            self._send = [one.tensor for one in self._shared]
            handles = link.gather_json([one.handle for one in self._shared], "handles of shared buffers")
            for peer in self._from:
                if link.shares_with(peer):
                    self._theirs[peer] = [open_buffer(handle) for handle in handles[peer]]
        else:
            self._send = _buffers(mine.send_bytes, device)
        self._receive = _buffers(mine.receive_bytes, device)
        self._works: list[dist.Work | None] = [None] * IN_FLIGHT
        self._places = [0] * link.world
        """Where in the send buffer of the round last packed the message to each rank begins."""
        self._words: list[list[int]] = [[]] * IN_FLIGHT
        """The same, as each rank has told this one."""
        self._packed = 0

    def start(self, k: int, source: Shards) -> None:
        """Pack round k and let it travel."""
        send, receive = self._send[k % IN_FLIGHT], self._receive[k % IN_FLIGHT]
        out, into = [0] * self._link.world, [0] * self._link.world
        first: dict[int, Tensor] = {}
        at = 0
        for peer, streams in self._to.items():
            self._places[peer] = at
            for stream, chunk in _chunks(streams, k):
                room = send[at : at + stream.room(chunk)]
                if id(stream) in first:
                    room.copy_(first[id(stream)])  # a multicast is packed once
                else:
                    first[id(stream)] = room
                    _pack(stream, chunk, room, source)
                at += len(room)
            if not self._link.shares_with(peer):
                out[peer] = at - self._places[peer]
        for peer, streams in self._from.items():
            if peer not in self._theirs:
                into[peer] = sum(stream.room(chunk) for stream, chunk in _chunks(streams, k))
        self._packed = k
        self._works[k % IN_FLIGHT] = self._link.start_round(receive[: sum(into)], send[: sum(out)], into, out)

    def swap(self) -> None:
        """Where buffers are shared: all have packed a round, and all have unpacked the one before."""
        if self._link.any_shares:
            self._words[self._packed % IN_FLIGHT] = self._link.swap(self._places)

    def finish(self, k: int, target: Shards) -> None:
        """Wait for round k and put what came where it belongs."""
        work = self._works[k % IN_FLIGHT]
        assert work is not None, f"round {k} was not started"
        self._link.wait(work, self._peers(k), self._describe(k))
        receive, at = self._receive[k % IN_FLIGHT], 0
        for peer, streams in self._from.items():
            here, place = receive, at
            if peer in self._theirs:
                here, place = self._theirs[peer][k % IN_FLIGHT], self._words[k % IN_FLIGHT][peer]
            for stream, chunk in _chunks(streams, k):
                _unpack(stream, chunk, here[place : place + stream.room(chunk)], target)
                place += stream.room(chunk)
            if peer not in self._theirs:
                at = place

    def _peers(self, k: int) -> list[int]:
        """Whom this rank exchanges something with in a round."""
        with_some = [
            peer for side in (self._to, self._from) for peer, streams in side.items() if any(_chunks(streams, k))
        ]
        return sorted(set(with_some))

    def _describe(self, k: int) -> str:
        streams = [*self._rounds.receives, *self._rounds.sends]
        parts = [part for stream, chunk in _chunks(streams, k) for part in stream.chunks[chunk]]
        names = f", parameters {parts[0].slice.name} to {parts[-1].slice.name}" if parts else ""
        return f"round {k + 1} of {self._rounds.rounds}{names}"


def _buffers(nbytes: int, device: torch.device) -> list[Tensor]:
    return [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(IN_FLIGHT)]


def _chunks(streams: list[Stream], k: int) -> Iterator[tuple[Stream, int]]:
    """Of round k, in the order in which both ends lay them out."""
    for stream in streams:
        chunk = stream.of_round(k)
        if chunk is not None:
            yield stream, chunk


def _pack(stream: Stream, chunk: int, room: Tensor, source: Shards) -> None:
    for elements, part in _parts(stream, chunk, room):
        elements.copy_(_view(source, part.slice))


def _unpack(stream: Stream, chunk: int, room: Tensor, target: Shards) -> None:
    for elements, part in _parts(stream, chunk, room):
        _view(target, part.slice).copy_(elements)


def _parts(stream: Stream, chunk: int, room: Tensor) -> Iterator[tuple[Tensor, Part]]:
    flat = room.view(_DTYPES[stream.dtype])
    for part in stream.chunks[chunk]:
        end = part.at + torch.Size(part.size).numel()
        yield flat[part.at : end].view(part.size), part


def _copy(mine: RankRounds, source: Shards, target: Shards) -> None:
    for taken, given in mine.copies:
        _view(target, given).copy_(_view(source, taken))


def _view(shards: Shards, where: Slice) -> Tensor:
    return shards[where.name][where.shard][where.where]
