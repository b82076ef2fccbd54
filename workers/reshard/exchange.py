"""Carries out one rank's schedule: copies inside the process, chunks to and from the others.

receives posted     0   1 | 2 ...
packed and sent     0   1 | 2 ...       chunk k+1 is packed and on its way while chunk k arrives
waited, unpacked        0 | 1 ...       two chunks of each stream in memory, no barrier between ranks

To a rank on the same device a chunk does not travel: both see its memory (shared.py), and words go instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_dist.reshard.schedule import IN_FLIGHT, RankSchedule, Slice, Stream
from rlhf_dist.reshard.shards import Shards
from workers.reshard.link import Link
from workers.reshard.shared import HANDLE_BYTES, SharedBuffer, new_buffer, open_buffer, settle

_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

_DATA, _HANDLE, _READY, _TAKEN, _KINDS = range(5)
"""Kinds of messages of one stream: each has tags of its own."""


@dataclass
class _Flow:
    """A stream under way."""

    stream: Stream
    buffers: list[Tensor]
    """[IN_FLIGHT][chunk elements]"""
    near: tuple[int, ...] = ()
    """Peers that see the same buffers."""
    works: list[list[tuple[int, dist.Work]]] = field(default_factory=lambda: [[] for _ in range(IN_FLIGHT)])
    """Of each buffer: (peer, what is still sending from it or receiving into it)."""
    shared: list[SharedBuffer] = field(default_factory=list)

    def chunk(self, k: int) -> Tensor:
        return self.buffers[k % IN_FLIGHT][: self.stream.length(k)]

    def tag(self, kind: int) -> int:
        return self.stream.tag * _KINDS + kind

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
    outgoing = [_sending(link, stream) for stream in schedule.sends]
    incoming = [_receiving(link, stream) for stream in schedule.receives]
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
    for flow in (*outgoing, *incoming):
        for k in range(max(len(flow.stream.chunks) - IN_FLIGHT, 0), len(flow.stream.chunks)):
            _finish(link, flow, k)
    return sum(flow.stream.elements * flow.buffers[0].element_size() for flow in incoming)


def _sending(link: Link, stream: Stream) -> _Flow:
    near = tuple(peer for peer in stream.receivers if link.shares_with(peer))
    sizes = [stream.length(k) for k in range(min(IN_FLIGHT, len(stream.chunks)))]
    dtype = _DTYPES[stream.dtype]
    if not near:
        return _Flow(stream, [torch.empty(size, dtype=dtype, device=link.device) for size in sizes])
    shared = [new_buffer(size, dtype, link.device) for size in sizes]
    flow = _Flow(stream, [one.tensor for one in shared], near, shared=shared)
    for k, one in enumerate(shared):
        handle = torch.frombuffer(bytearray(one.handle), dtype=torch.uint8)
        # Waited for with the first chunk: the peers come to receive once their own are on the way.
        flow.works[k] += [(peer, link.send(handle, peer, flow.tag(_HANDLE))) for peer in near]
    return flow


def _receiving(link: Link, stream: Stream) -> _Flow:
    count = min(IN_FLIGHT, len(stream.chunks))
    if not link.shares_with(stream.sender):
        sizes = [stream.length(k) for k in range(count)]
        return _Flow(stream, [torch.empty(n, dtype=_DTYPES[stream.dtype], device=link.device) for n in sizes])
    flow = _Flow(stream, [], (stream.sender,))
    for _ in range(count):
        handle = torch.empty(HANDLE_BYTES, dtype=torch.uint8)
        work = link.receive(handle, stream.sender, flow.tag(_HANDLE))
        link.wait(work, (stream.sender,), "handles of shared buffers")
        flow.buffers.append(open_buffer(handle.numpy().tobytes(), link.device))
    return flow


def _receive(link: Link, flow: _Flow, k: int) -> None:
    into, kind = (torch.empty(1), _READY) if flow.near else (flow.chunk(k), _DATA)
    # Its word that the buffer's last chunk is taken may still be on its way; a stream's words keep their order.
    work = link.receive(into, flow.stream.sender, flow.tag(kind))
    flow.works[k % IN_FLIGHT].append((flow.stream.sender, work))


def _send(link: Link, flow: _Flow, k: int, source: Shards) -> None:
    if k >= IN_FLIGHT:
        _finish(link, flow, k - IN_FLIGHT)
    chunk = flow.chunk(k)
    for part in flow.stream.chunks[k]:
        view = _view(source, part.slice)
        chunk[part.at : part.at + view.numel()].view(part.size).copy_(view)
    if flow.near:
        settle(link.device)
    works = flow.works[k % IN_FLIGHT]
    for to in flow.stream.receivers:
        if to in flow.near:
            works.append((to, link.send(torch.zeros(1), to, flow.tag(_READY))))
            works.append((to, link.receive(torch.empty(1), to, flow.tag(_TAKEN))))
        else:
            works.append((to, link.send(chunk, to, flow.tag(_DATA))))


def _unpack(link: Link, flow: _Flow, k: int, target: Shards) -> None:
    _finish(link, flow, k)
    chunk = flow.chunk(k)
    for part in flow.stream.chunks[k]:
        view = _view(target, part.slice)
        view.copy_(chunk[part.at : part.at + view.numel()].view(part.size))
    if flow.near:
        settle(link.device)
        [sender] = flow.near
        flow.works[k % IN_FLIGHT].append((sender, link.send(torch.zeros(1), sender, flow.tag(_TAKEN))))


def _finish(link: Link, flow: _Flow, k: int) -> None:
    works = flow.works[k % IN_FLIGHT]
    for peer, work in works:
        link.wait(work, (peer,), flow.describe(k))
    works.clear()


def _view(shards: Shards, where: Slice) -> Tensor:
    return shards[where.name][where.shard][where.where]
