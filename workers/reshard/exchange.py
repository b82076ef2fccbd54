"""Carries out one rank's schedule: copies inside the process, chunks to and from the others.

receives posted     0   1 | 2 ...
packed and sent     0   1 | 2 ...       chunk k+1 is packed and on its way while chunk k arrives
waited, unpacked        0 | 1 ...       two chunks of each stream in memory, no barrier between ranks
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_dist.reshard.schedule import IN_FLIGHT, RankSchedule, Slice, Stream
from rlhf_dist.reshard.shards import Shards
from workers.reshard.link import Link

_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclass
class _Flow:
    """A stream under way."""

    stream: Stream
    buffers: list[Tensor]
    """[IN_FLIGHT][chunk elements]"""
    works: list[list[dist.Work]]
    """Of each buffer: what is still sending from it or receiving into it."""

    def chunk(self, k: int) -> Tensor:
        return self.buffers[k % IN_FLIGHT][: self.stream.length(k)]

    def describe(self, k: int) -> str:
        names = [part.slice.name for part in self.stream.chunks[k]]
        through = f" to {names[-1]}" if names[-1] != names[0] else ""
        return f"chunk {k + 1} of {len(self.stream.chunks)}, parameters {names[0]}{through}"


def exchange(schedule: RankSchedule, source: Shards, target: Shards, link: Link | None) -> int:
    """Fill the target shards from the source shards of all ranks; returns bytes received from others.

    Values are cast to the target's dtype before they travel. `link` None: only for a schedule without streams.
    Raises SyncStopped naming phase, ranks and parameters.
    """
    for mine, theirs in schedule.copies:
        _view(target, theirs).copy_(_view(source, mine))
    if link is None:
        assert not schedule.sends and not schedule.receives, "a schedule that sends needs a link"
        return 0
    link.phase = "exchange"
    outgoing = [_flow(stream, link.device) for stream in schedule.sends]
    incoming = [_flow(stream, link.device) for stream in schedule.receives]
    rounds = max((len(flow.stream.chunks) for flow in (*outgoing, *incoming)), default=0)
    for k in range(rounds + 1):
        for flow in incoming:
            if k < len(flow.stream.chunks):
                _receive(link, flow, k)
        for flow in outgoing:
            if k < len(flow.stream.chunks):
                _send(link, flow, k, source)
        for flow in incoming:
            if 0 <= k - 1 < len(flow.stream.chunks):
                _unpack(link, flow, k - 1, target)
    for flow in outgoing:
        for k in range(max(len(flow.stream.chunks) - IN_FLIGHT, 0), len(flow.stream.chunks)):
            _finish(link, flow, k)
    return sum(flow.stream.elements * flow.buffers[0].element_size() for flow in incoming)


def _flow(stream: Stream, device: torch.device) -> _Flow:
    count = min(IN_FLIGHT, len(stream.chunks))
    buffers = [torch.empty(stream.length(k), dtype=_DTYPES[stream.dtype], device=device) for k in range(count)]
    return _Flow(stream, buffers, [[] for _ in range(count)])


def _receive(link: Link, flow: _Flow, k: int) -> None:
    flow.works[k % IN_FLIGHT].append(link.receive(flow.chunk(k), flow.stream.sender, flow.stream.tag))


def _send(link: Link, flow: _Flow, k: int, source: Shards) -> None:
    if k >= IN_FLIGHT:
        _finish(link, flow, k - IN_FLIGHT)
    chunk = flow.chunk(k)
    for part in flow.stream.chunks[k]:
        view = _view(source, part.slice)
        chunk[part.at : part.at + view.numel()].view(part.size).copy_(view)
    flow.works[k % IN_FLIGHT] = [link.send(chunk, to, flow.stream.tag) for to in flow.stream.receivers]


def _unpack(link: Link, flow: _Flow, k: int, target: Shards) -> None:
    _finish(link, flow, k)
    chunk = flow.chunk(k)
    for part in flow.stream.chunks[k]:
        view = _view(target, part.slice)
        view.copy_(chunk[part.at : part.at + view.numel()].view(part.size))


def _finish(link: Link, flow: _Flow, k: int) -> None:
    sends = flow.stream.sender == link.rank
    peers = flow.stream.receivers if sends else (flow.stream.sender,)
    works = flow.works[k % IN_FLIGHT]
    for i, work in enumerate(works):
        link.wait(work, (peers[i],), flow.describe(k))
    works.clear()


def _view(shards: Shards, where: Slice) -> Tensor:
    return shards[where.name][where.shard][where.where]
