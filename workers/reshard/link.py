"""A private process group for weight syncs, apart from the ones that train: when a sync breaks it, nothing else does.

Its ranks may be those of one world, or of two that know nothing of each other (training pool, generation pool):
all they share is a store (`rendezvous`). Every sync starts with a meeting at the store, which is where a missing
rank shows, and where a link that broke on any rank is opened anew on all.

    meet   key EPOCH/RANK set by each ──> wait for the keys of all ranks ──> any says "broken"? reopen; go on

A meeting that somebody missed takes its epoch out of use, so that all ranks find each other in a later one however
often each of them has tried.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions

T = TypeVar("T")


class SyncStopped(RuntimeError):
    """A weight sync that did not come to its end: a peer died, stalled or failed. The next call starts afresh."""

    def __init__(self, phase: str, rank: int, peers: Sequence[int], what: str, cause: str) -> None:
        self.phase, self.rank, self.peers = phase, rank, tuple(peers)
        with_whom = f"waiting for rank{'s' if len(self.peers) != 1 else ''} {', '.join(map(str, self.peers))}"
        super().__init__(
            f"weight sync stopped in phase {phase!r}: rank {rank} {with_whom}{f', {what}' if what else ''}: {cause}. "
            "The weights of this sync are not used; see the log of the ranks named, then sync again"
        )


def rendezvous(address: str, port: int, hosts: bool, timeout_s: float) -> dist.Store:
    """The store of ranks that share no process group; one rank `hosts` it."""
    return dist.TCPStore(address, port, is_master=hosts, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


class Link:
    """Sends, receives and small exchanges between `world` ranks, each bounded by the deadline that `meet` sets."""

    def __init__(
        self,
        store: dist.Store,
        name: str,
        rank: int,
        world: int,
        device: torch.device,
        timeout_s: float,
        *,
        reaches: str | None = None,
    ) -> None:
        """Opens nothing yet: the first `meet` does. `timeout_s` bounds a whole sync. All ranks give the same
        name, which no link over this store has had before. reaches: the address of one of the ranks, where
        they are on several machines and the default process group may be bound to the loopback of one."""
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be > 0, got {timeout_s}; it is what one sync may take")
        self.rank, self.world, self.device = rank, world, device
        self._store = dist.PrefixStore(f"reshard/{name}", store)
        self._timeout_s = timeout_s
        self._reaches = reaches
        self._deadline = 0.0
        self._epoch = -1
        self._group: dist.ProcessGroup | None = None
        self.phase = "idle"

    def meet(self) -> None:
        """Start a sync on all ranks. Raises SyncStopped naming the ranks that did not come."""
        self._deadline = time.monotonic() + self._timeout_s
        self.phase = "meet"
        try:
            self._epoch = max(self._epoch + 1, self._next_epoch())
            keys = [f"{self._epoch}/{rank}" for rank in range(self.world)]
            self._store.set(keys[self.rank], "broken" if self._group is None else "open")
            self._store.wait(keys, timedelta(seconds=self._timeout_s))
            broken = any(self._store.get(key) == b"broken" for key in keys)
        except (RuntimeError, dist.DistError) as error:
            absent = self._absent()
            raise SyncStopped("meet", self.rank, absent, "", f"not there within {self._timeout_s} s") from error
        if broken:
            self.shut()
            self.phase = "connect"
            try:
                self._group = self._open(dist.PrefixStore(f"{self._epoch}/group", self._store))
            except RuntimeError as error:
                raise SyncStopped("connect", self.rank, self._others(), "", _first_line(error)) from error

    def shut(self) -> None:
        """Drop the connections; peers waiting for this rank learn of it at once."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def send(self, tensor: Tensor, to: int, tag: int) -> dist.Work:
        """Start sending; the tensor must stay as it is until `wait`."""
        return self._run([to], "", lambda group: group.send([tensor], to, tag))

    def receive(self, tensor: Tensor, sender: int, tag: int) -> dist.Work:
        """Start receiving into a tensor."""
        return self._run([sender], "", lambda group: group.recv([tensor], sender, tag))

    def wait(self, work: dist.Work, peers: Sequence[int], what: str) -> None:
        """Wait until a send or receive is done. Raises SyncStopped at the deadline or when the peer is gone."""
        self._run(peers, what, lambda _: work.wait(timedelta(seconds=self._left())))

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """int64 sum over all ranks (wrapping), in place; values on the CPU."""
        self._collect(lambda group, options: group.allreduce([values], options), AllreduceOptions())
        return values

    def all_gather(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's int64 values, by rank."""
        mine = torch.tensor(list(values), dtype=torch.int64)
        out = [torch.empty_like(mine) for _ in range(self.world)]
        self._collect(lambda group, options: group.allgather([out], [mine], options), AllgatherOptions())
        return [tensor.tolist() for tensor in out]

    def _collect(self, start: Callable[[dist.ProcessGroup, object], dist.Work], options: object) -> None:
        def run(group: dist.ProcessGroup) -> None:
            options.timeout = timedelta(seconds=self._left())  # type: ignore[attr-defined]
            start(group, options).wait()

        self._run(self._others(), "", run)

    def _run(self, peers: Sequence[int], what: str, call: Callable[[dist.ProcessGroup], T]) -> T:
        if self._group is None:
            raise RuntimeError("this link is shut: call meet() on all ranks first")
        try:
            return call(self._group)
        except (RuntimeError, ValueError) as error:
            self.shut()
            raise SyncStopped(self.phase, self.rank, peers, what, _first_line(error)) from error

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 1e-3)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world) if rank != self.rank]

    def _next_epoch(self) -> int:
        return int(self._store.get("epoch")) if self._store.check(["epoch"]) else 0

    def _absent(self) -> list[int]:
        """Who did not come; and nobody meets in this epoch any more."""
        try:
            if self._next_epoch() <= self._epoch:
                self._store.set("epoch", str(self._epoch + 1))
            return [rank for rank in range(self.world) if not self._store.check([f"{self._epoch}/{rank}"])]
        except (RuntimeError, dist.DistError):
            return self._others()  # the store itself is gone

    def _open(self, store: dist.Store) -> dist.ProcessGroup:
        """A group that no other code knows: gloo for host memory, and NCCL beside it for a CUDA device."""
        timeout = timedelta(seconds=self._left())
        group = dist.ProcessGroup(store, self.rank, self.world)
        gloo_options = dist.ProcessGroupGloo._Options()
        gloo_options._timeout = timeout
        gloo_options._devices = [
            dist.ProcessGroupGloo.create_device(hostname=own_address(self._reaches))
            if self._reaches
            else dist.ProcessGroupGloo.create_default_device()
        ]
        gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), self.rank, self.world, gloo_options)
        kind = dist.ProcessGroup.BackendType
        group._register_backend(torch.device("cpu"), kind.GLOO, gloo)
        group._set_default_backend(kind.GLOO)
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), self.rank, self.world, options)
            group._register_backend(torch.device("cuda"), kind.NCCL, nccl)
        return group


def own_address(other: str) -> str:
    """The address of this machine's interface that reaches `other`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # a datagram socket sends nothing here, it only chooses the interface
        return str(probe.getsockname()[0])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
