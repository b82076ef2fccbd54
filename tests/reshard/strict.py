"""A double of NCCL's rules for CPU tests: a back end that forgives nothing.

    rule                                            here
    an operation ends when its peers' has begun     a header goes both ways before any element does
    one stream a communicator, in order of posting  a thread with a queue: the world's, and one of each pair
    tags do not count                               they are not looked at
    both receive, or both send first: for ever      so it is
    sizes that differ: undefined                    an error on both sides
    a failed peer wakes nobody                      its sockets are left open; an error in them is waited on for ever
    pairs with nothing to say do not meet           likewise

What travels goes over a gloo group of its own, on real processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from queue import Queue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions, BroadcastOptions

from workers.reshard import connect

_KINDS = ("send", "receive", "alltoall", "allreduce", "allgather", "broadcast")
_FOR_EVER = timedelta(days=1)
_HEADER, _DATA = 1, 2
_real = connect.open_connections


def use(strict: bool) -> None:
    """Links that open their connections from now on keep the strict rules, or gloo's."""
    connect.open_connections = _open if strict else _real


def _open(
    store: dist.Store, rank: int, world: int, device: torch.device, host: str | None, timeout_s: float
) -> connect.Connections:
    words, weights = (
        StrictGroup(dist.PrefixStore(name, store), rank, world, host, timeout_s) for name in ("words", "weights")
    )
    return connect.Connections(words, weights, device)


class Mismatch(RuntimeError):
    """Two ends of an operation of different kind or size."""


class StrictWork:
    """An operation under way."""

    def __init__(self) -> None:
        self._done, self._error = threading.Event(), None

    def end(self, error: Exception | None = None) -> None:
        self._error = error
        self._done.set()

    def is_completed(self) -> bool:
        return self._done.is_set()

    def wait(self, timeout: timedelta = _FOR_EVER) -> None:
        if not self._done.wait(timeout.total_seconds()):
            raise TimeoutError("not matched")
        if self._error is not None:
            raise self._error


class StrictGroup:
    """Of all ranks. Called as torch's back ends are."""

    def __init__(self, store: dist.Store, rank: int, world: int, host: str | None, timeout_s: float) -> None:
        self._rank, self._world = rank, world
        options = connect._gloo_options(host, timeout_s)
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("strict", store), rank, world, options)
        self._queues: dict[object, Queue[Any]] = {}
        self._dead = threading.Event()

    def send(self, tensors: list[Tensor], to: int, tag: int) -> StrictWork:
        [tensor] = tensors
        return self._post(("pair", to), lambda: self._single("send", "receive", tensor, to))

    def recv(self, tensors: list[Tensor], sender: int, tag: int) -> StrictWork:
        [tensor] = tensors
        return self._post(("pair", sender), lambda: self._single("receive", "send", tensor, sender))

    def alltoall_base(self, out: Tensor, mine: Tensor, takes: list[int], gives: list[int], _: object) -> StrictWork:
        takes, gives = (
            takes or [len(out) // self._world] * self._world,
            gives or [len(mine) // self._world] * self._world,
        )
        assert sum(takes) == len(out) and sum(gives) == len(mine), "splits must add up to the tensors"
        item = mine.element_size()

        def run() -> None:
            into, parts = list(out.split(takes)), list(mine.split(gives))
            into[self._rank].copy_(parts[self._rank])
            peers = [peer for peer in self._others() if takes[peer] or gives[peer]]
            self._match("alltoall", {peer: (gives[peer] * item, takes[peer] * item) for peer in peers})
            works = [self._gloo.recv([into[peer]], peer, _DATA) for peer in peers if takes[peer]]
            works += [self._gloo.send([parts[peer]], peer, _DATA) for peer in peers if gives[peer]]
            for work in works:
                work.wait(_FOR_EVER)

        return self._post("world", run)

    def allreduce(self, tensors: list[Tensor], _: object) -> StrictWork:
        return self._collective(
            "allreduce", tensors[0].nbytes, AllreduceOptions(), lambda o: self._gloo.allreduce(tensors, o)
        )

    def allgather(self, out: list[list[Tensor]], mine: list[Tensor], _: object) -> StrictWork:
        return self._collective(
            "allgather", mine[0].nbytes, AllgatherOptions(), lambda o: self._gloo.allgather(out, mine, o)
        )

    def broadcast(self, tensors: list[Tensor], given: Any) -> StrictWork:
        options = BroadcastOptions()
        options.rootRank = given.rootRank
        return self._collective("broadcast", tensors[0].nbytes, options, lambda o: self._gloo.broadcast(tensors, o))

    def abort(self) -> None:
        """This rank goes on to nothing more here; the others do not hear of it."""
        self._dead.set()

    def _collective(self, kind: str, nbytes: int, options: Any, start: Callable[[Any], Any]) -> StrictWork:
        options.timeout = _FOR_EVER

        def run() -> None:
            self._match(kind, {peer: (nbytes, nbytes) for peer in self._others()})
            start(options).wait()

        return self._post("world", run)

    def _single(self, kind: str, other: str, tensor: Tensor, peer: int) -> None:
        size = tensor.nbytes
        self._match(kind, {peer: (size, 0) if kind == "send" else (0, size)}, other)
        (self._gloo.send if kind == "send" else self._gloo.recv)([tensor], peer, _DATA).wait(_FOR_EVER)

    def _match(self, kind: str, sizes: dict[int, tuple[int, int]], other: str = "") -> None:
        """Meet every peer at its operation; sizes: peer -> (bytes to it, bytes from it)."""
        theirs = {peer: torch.empty(3, dtype=torch.int64) for peer in sizes}
        heads = {peer: torch.tensor([_KINDS.index(kind), *size]) for peer, size in sizes.items()}
        works = [self._gloo.recv([head], peer, _HEADER) for peer, head in theirs.items()]
        works += [self._gloo.send([head], peer, _HEADER) for peer, head in heads.items()]
        for work in works:
            work.wait(_FOR_EVER)
        for peer, (gives, takes) in sizes.items():
            at, given, taken = theirs[peer].tolist()
            if other and _KINDS[at] == kind:
                threading.Event().wait()  # both receive, or both send: neither ever ends
            if (_KINDS[at], given, taken) != (other or kind, takes, gives):
                raise Mismatch(
                    f"rank {self._rank} {kind} of {gives} and {takes} bytes meets {_KINDS[at]} of {given} and {taken} "
                    f"bytes on rank {peer}"
                )

    def _post(self, stream: object, run: Callable[[], None]) -> StrictWork:
        if stream not in self._queues:
            self._queues[stream] = Queue()
            threading.Thread(target=self._serve, args=(self._queues[stream],), daemon=True).start()
        work = StrictWork()
        self._queues[stream].put((work, run))
        return work

    def _serve(self, queue: Queue[Any]) -> None:
        while True:
            work, run = queue.get()
            try:
                run()
            except Mismatch as error:
                work.end(error)
                continue
            except RuntimeError:
                threading.Event().wait()  # the peer is gone; nobody wakes this rank
            if self._dead.is_set():
                return
            work.end()

    def _others(self) -> list[int]:
        return [peer for peer in range(self._world) if peer != self._rank]
