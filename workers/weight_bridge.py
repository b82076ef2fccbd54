"""Trained weights across two worlds: from a training pool's ranks to those of a rollout pool.

    training pool   rank 0 .. n-1   all-gather bucket by bucket; rank 0 sends
                        |
                     bridge         a process group of its own: rank 0 of training, then every rollout rank
                        v
    rollout pool    rank 0 .. m-1   receive the same buckets, check each against the announced checksums

Every wait ends within the timeout or raises. What is sent is announced first (version, name and checksum of
every parameter), so a receiver knows when something is missing or wrong.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from workers.engines.generation import Bucket

_SENDER = 0


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """What a sync is going to send."""

    version: int
    checksums: Mapping[str, int]
    """Parameter -> `full_checksum` of what the sender holds, in the rollout dtype."""


class WeightBridge(Protocol):
    """Both ends call in turn: announce and send here, receive there."""

    def send(self, announcement: Announcement, buckets: Iterator[Bucket]) -> int:
        """Send all buckets; returns their bytes. Every training rank calls it, since buckets are gathered."""
        ...

    def receive(self) -> tuple[Announcement, Iterator[Bucket]]:
        """What is announced, and the buckets as they arrive; all of them must be drawn."""
        ...


class BroadcastBridge:
    """Full parameters in bounded buckets, one broadcast each: simple, and right for every pair of layouts."""

    def __init__(self, *, address: str, port: int, rank: int | None, size: int, device: torch.device, timeout_s: float):
        """rank: this process's in the bridge, 0 for the sender; None for a training rank that only gathers."""
        self._rank, self._device = rank, device
        self._group = None if rank is None else _group(address, port, rank, size, device, timeout_s)

    def send(self, announcement: Announcement, buckets: Iterator[Bucket]) -> int:
        """See WeightBridge."""
        sent = 0
        self._broadcast_object(announcement)
        for bucket in buckets:
            sent += sum(tensor.nbytes for _, tensor in bucket)
            if self._group is not None:
                self._broadcast_object([(name, tuple(tensor.shape), tensor.dtype) for name, tensor in bucket])
                self._broadcast(torch.cat([_bytes_of(tensor) for _, tensor in bucket]))
        self._broadcast_object(None)
        return sent

    def receive(self) -> tuple[Announcement, Iterator[Bucket]]:
        """See WeightBridge."""
        announcement = self._broadcast_object()
        assert isinstance(announcement, Announcement), f"a sync begins with an announcement, got {announcement!r}"
        return announcement, self._arriving()

    def _arriving(self) -> Iterator[Bucket]:
        while (entries := self._broadcast_object()) is not None:
            sizes = [dtype.itemsize * torch.Size(shape).numel() for _, shape, dtype in entries]
            flat = self._broadcast(torch.empty(sum(sizes), dtype=torch.uint8, device=self._device))
            yield [
                # A clone: a part of the flat bytes may not be aligned for its dtype.
                (name, part.clone().view(dtype).view(shape))
                for (name, shape, dtype), part in zip(entries, flat.split(sizes), strict=True)
            ]

    def _broadcast_object(self, value: Any = None) -> Any:
        """The sender's value on every rank of the bridge."""
        if self._group is None:
            return value
        if self._rank == _SENDER:
            data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(self._device)
            self._broadcast(torch.tensor([len(data)], device=self._device))
            self._broadcast(data)
            return value
        length = int(self._broadcast(torch.empty(1, dtype=torch.int64, device=self._device)))
        data = self._broadcast(torch.empty(length, dtype=torch.uint8, device=self._device))
        return pickle.loads(data.cpu().numpy().tobytes())

    def _broadcast(self, tensor: Tensor) -> Tensor:
        options = dist.BroadcastOptions()
        options.rootRank = _SENDER
        assert self._group is not None, "only ranks of the bridge broadcast"
        self._group.broadcast([tensor], options).wait()
        return tensor


def _group(address: str, port: int, rank: int, size: int, device: torch.device, timeout_s: float) -> dist.ProcessGroup:
    """A process group beside the default one, which each world keeps for itself."""
    timeout = timedelta(seconds=timeout_s)
    store = dist.PrefixStore("weights", dist.TCPStore(address, port, size, is_master=rank == _SENDER, timeout=timeout))
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    gloo = dist.ProcessGroupGloo._Options()
    gloo._timeout = timeout
    gloo._devices = [
        dist.ProcessGroupGloo.create_device(hostname=address if rank == _SENDER else _own_address(address))
    ]
    return dist.ProcessGroupGloo(store, rank, size, gloo)


def _own_address(other: str) -> str:
    """The address of this machine's interface that reaches `other`."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # a datagram socket sends nothing here, it only chooses the interface
        return str(probe.getsockname()[0])


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
