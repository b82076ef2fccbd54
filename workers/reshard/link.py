"""A private process group for weight syncs, apart from the ones that train: when a sync breaks it, nothing else does.

Its ranks may be those of one world, or of two that know nothing of each other (training pool, generation pool):
all they share is a store (`rendezvous`). Every sync starts with a meeting at the store, which is where a missing
rank shows, and where a link that broke on any rank is opened anew on all.

    meet   key EPOCH/RANK set by each ──> wait for the keys of all ranks ──> any says "broken"? reopen; go on

A meeting that somebody missed takes its epoch out of use, so that all ranks find each other in a later one however
often each of them has tried.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions, BroadcastOptions

from workers.reshard.shared import device_identity

T = TypeVar("T")


class SyncStopped(RuntimeError):
    """A weight sync that did not come to its end: a peer died, stalled or failed. The next call starts afresh."""

    def __init__(self, phase: str, rank: int, peers: Sequence[int], what: str, cause: str) -> None:
        self.phase, self.rank, self.peers, self.what, self.cause = phase, rank, tuple(peers), what, cause
        # What the class is called with: an exception is unpickled by calling its class with these.
        super().__init__(phase, rank, self.peers, what, cause)

    def __str__(self) -> str:
        with_whom = f"waiting for rank{'s' if len(self.peers) != 1 else ''} {', '.join(map(str, self.peers))}"
        what = f", {self.what}" if self.what else ""
        return (
            f"weight sync stopped in phase {self.phase!r}: rank {self.rank} {with_whom}{what}: {self.cause}. "
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
        host: str | None = None,
        shares: bool = False,
    ) -> None:
        """Opens nothing yet: the first `meet` does. `timeout_s` bounds a whole sync. All ranks give the same
        name, which no link over this store has had before. host: this machine's address, as the other ranks reach
        it; None: what GLOO_SOCKET_IFNAME or the host name say. shares: ranks on one
        machine see each other's buffers (CPU); those on one GPU always do."""
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be > 0, got {timeout_s}; it is what one sync may take")
        self.rank, self.world, self.device = rank, world, device
        self._store = dist.PrefixStore(f"reshard/{name}", store)
        self._timeout_s, self._host = timeout_s, host
        self._identity = device_identity(device) if shares or device.type == "cuda" else ""
        self._identities: list[str] = []
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
            self._identities = self.all_gather_object(self._identity)

    def shares_with(self, peer: int) -> bool:
        """Whether a peer sees this rank's buffers."""
        return bool(self._identity) and self._identities[peer] == self._identity

    @property
    def is_open(self) -> bool:
        """Whether this rank still has its connections; a failure drops them until the next `meet`."""
        return self._group is not None

    def shut(self) -> None:
        """Drop the connections; peers waiting for this rank learn of it at once."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    @contextmanager
    def kept_while(self, phase: str) -> Iterator[None]:
        """Name what happens inside; an exception in it drops the connections, so that peers learn of it at once."""
        self.phase = phase
        try:
            yield
        except Exception:
            self.shut()
            raise

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

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's picklable value, by rank; for what is small."""
        data = pickle.dumps(value)
        sizes = [size for [size] in self.all_gather([len(data)])]
        mine = torch.frombuffer(bytearray(data.ljust(max(sizes), b"\0")), dtype=torch.uint8)
        out = [torch.empty_like(mine) for _ in range(self.world)]
        self._collect(lambda group, options: group.allgather([out], [mine], options), AllgatherOptions())
        return [pickle.loads(tensor.numpy().tobytes()[:size]) for tensor, size in zip(out, sizes, strict=True)]

    def broadcast_object(self, value: Any, sender: int) -> Any:
        """One rank's picklable value on every rank; what the others give is not looked at."""
        data = pickle.dumps(value) if self.rank == sender else b""
        size = self.all_gather([len(data)])[sender][0]
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(size, dtype=torch.uint8)
        options = BroadcastOptions()
        options.rootRank = sender
        self._collect(lambda group, options: group.broadcast([flat], options), options)
        return pickle.loads(flat.numpy().tobytes())

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
        tcp = self._gloo_options(timeout)
        gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), self.rank, self.world, tcp)
        kind = dist.ProcessGroup.BackendType
        group._register_backend(torch.device("cpu"), kind.GLOO, gloo)
        group._set_default_backend(kind.GLOO)
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), self.rank, self.world, options)
            group._register_backend(torch.device("cuda"), kind.NCCL, nccl)
        return group

    def _gloo_options(self, timeout: timedelta) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timeout
        create, interface = dist.ProcessGroupGloo.create_device, os.environ.get("GLOO_SOCKET_IFNAME")
        if self._host:
            options._devices = [create(hostname=self._host)]
        elif interface:
            options._devices = [create(interface=interface)]
        else:
            options._devices = [dist.ProcessGroupGloo.create_default_device()]
        return options


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
