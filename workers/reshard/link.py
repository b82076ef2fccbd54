"""A private process group for weight syncs, apart from the ones that train: when a sync breaks it, nothing else does.

Its ranks may be those of one world, or of two that know nothing of each other (training pool, generation pool):
all they share is a store (`rendezvous`). Every sync starts with a meeting at the store, which is where a missing
rank shows, and where a link that broke on any rank is opened anew on all.

    meet   key EPOCH/RANK set by each ──> wait for the keys of all ranks ──> any says "broken"? reopen; go on

A meeting that somebody missed takes its epoch out of use, so that all ranks find each other in a later one however
often each of them has tried.

Every wait is a loop of its own over "is it done?", the sync's deadline and what the others tell (watch.py): it neither
counts on a failed peer's connections closing nor on a back end's own time-out. All ranks start the same operations in
the same order, and each is one collective.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions, AllToAllOptions, BroadcastOptions

from rlhf_dist.failure import FailureKind
from workers.network import keys_there, remove_keys
from workers.reshard import connect
from workers.reshard.watch import SILENCE_S, Trouble, Watch

T = TypeVar("T")
_log = logging.getLogger(__name__)

_RETIRE_S = 2.0
"""For a word with the store that the sync does not depend on."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 2e-5, 1e-3
"""Between two looks at an operation under way."""
_LONGEST_STORE_PAUSE_S = 0.05


class SyncStopped(RuntimeError):
    """A weight sync that did not come to its end: a peer died, stalled or failed. The next call starts afresh."""

    failure_kind = FailureKind.INFRASTRUCTURE

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


class _Absent(tuple[int, ...]):
    """Ranks that have not come to a meeting."""


class Link:
    """Rounds of weights and small exchanges between `world` ranks, bounded by the deadline that `meet` sets."""

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
        silence_s: float = SILENCE_S,
    ) -> None:
        """Opens nothing yet: the first `meet` does. `timeout_s` bounds a whole sync. All ranks give the same
        name, which no link over this store has had before; rank 0's process hosts the store. host: this machine's
        address, as the other ranks reach it; None: what GLOO_SOCKET_IFNAME or the host name say. shares: ranks on one
        machine see each other's buffers; those on one GPU always do. silence_s: without a word for so long, a rank
        counts as gone."""
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be > 0, got {timeout_s}; it is what one sync may take")
        self.rank, self.world, self.device = rank, world, device
        self._held = store  # Where this process hosts it, it ends with the last that holds on to it.
        # Connections of its own: one that a stopped host blocks is blocked for whoever else uses it.
        self._store = dist.PrefixStore(f"reshard/{name}", store.clone())  # type: ignore[attr-defined]
        watched = dist.PrefixStore(f"reshard/{name}/watch", store.clone())  # type: ignore[attr-defined]
        self._watch = Watch(watched, rank, world, silence_s)
        self._timeout_s, self._host, self._shares = timeout_s, host, shares
        self._machines: list[str] = []
        self._deadline = 0.0
        self._epoch = -1
        self._connections: connect.Connections | None = None
        self._phase = "idle"

    def __del__(self) -> None:
        if hasattr(self, "_watch"):
            self._watch.close()

    @property
    def phase(self) -> str:
        """What this rank is doing, for errors."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self._phase = phase
        self._watch.enter(phase)

    def meet(self) -> None:
        """Start a sync on all ranks. Raises SyncStopped naming the ranks that did not come."""
        self._deadline = time.monotonic() + self._timeout_s
        self.phase = "meet"
        others = self._others()
        self._watch.start(self._epoch + 1)  # what ended the last epoch is no reason to end this one
        self._epoch = max(self._epoch + 1, self._at_store(self._next_epoch, others))
        self._watch.start(self._epoch)
        try:
            told = self._at_store(self._gather_marks, others)
        except SyncStopped:
            self._retire()
            raise
        if isinstance(told, _Absent):
            self._retire()
            where = "; ".join(self._watch.table(told)) or "never seen"
            cause = f"not there within {self._timeout_s} s, last seen: {where}"
            raise self._stopped(told, "", Trouble(told, cause))
        if self.rank == 0:
            self._at_store(self._forget_earlier, others)
        if any(mark["broken"] for mark in told):
            self.shut()
            self.phase = "connect"
            alone = connect.one_device_each([mark["device"] for mark in told])
            self._machines = [mark["machine"] for mark in told] if self._shares or not alone else []
            over = self.device if alone else torch.device("cpu")
            store = dist.PrefixStore(f"{self._epoch}/group", self._store)
            try:
                self._connections = connect.open_connections(
                    store, self.rank, self.world, over, self._host, self._left()
                )
            except RuntimeError as error:
                raise self._stopped(others, "", self._watch.after_error(_first_line(error))) from error

    @property
    def buffer_device(self) -> torch.device:
        """Where what travels must lie."""
        return self._open().device

    def shares_with(self, peer: int) -> bool:
        """Whether a peer sees this rank's buffers."""
        return bool(self._machines) and self._machines[peer] == self._machines[self.rank]

    @property
    def any_shares(self) -> bool:
        """Whether some two ranks see each other's buffers; all ranks say the same."""
        return len(set(self._machines)) < len(self._machines)

    @property
    def is_open(self) -> bool:
        """Whether this rank still has its connections; a failure drops them until the next `meet`."""
        return self._connections is not None

    def shut(self) -> None:
        """Drop the connections; what the others hear of it depends on the back end."""
        connections, self._connections = self._connections, None
        if connections is not None:
            connections.abort()

    def fail(self, error: BaseException) -> None:
        """Give up this sync: peers that wait for this rank hear of it within seconds."""
        if not isinstance(error, SyncStopped):
            self._watch.fail(f"rank {self.rank} failed with {_first_line(error)}", [self.rank])
        self.shut()

    @contextmanager
    def kept_while(self, phase: str) -> Iterator[None]:
        """Name what happens inside; an exception in it gives up the sync."""
        self.phase = phase
        try:
            yield
        except Exception as error:
            self.fail(error)
            raise

    def start_round(
        self, received: Tensor, sent: Tensor, receive_bytes: Sequence[int], send_bytes: Sequence[int]
    ) -> dist.Work:
        """Start giving `send_bytes[r]` of `sent` to each rank r, its share behind those of the ranks before, and
        taking `receive_bytes[r]` into `received` likewise. Both are uint8 on `buffer_device` and stay as they are until
        `wait`. Every rank takes part in every round.
        """
        options = AllToAllOptions()
        options.timeout = timedelta(seconds=self._left())
        return self._try(
            lambda open_: cast(
                dist.Work, open_.weights.alltoall_base(received, sent, list(receive_bytes), list(send_bytes), options)
            )
        )

    def wait(self, work: dist.Work, peers: Sequence[int], what: str) -> None:
        """Wait until a round is done. Raises SyncStopped at the deadline, or when a peer has failed or gone silent."""
        self._until(work.is_completed, peers, what)
        self._try(lambda _: work.wait())

    def swap(self, values: Sequence[int]) -> list[int]:
        """values[r] goes to rank r; what each rank has given to this one, by rank."""
        mine = torch.tensor(list(values), dtype=torch.int64)
        theirs = torch.empty_like(mine)
        self._collect(AllToAllOptions(), lambda words, options: words.alltoall_base(theirs, mine, [], [], options))
        return [int(value) for value in theirs]

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """int64 sum over all ranks (wrapping), in place; values on the CPU."""
        self._collect(AllreduceOptions(), lambda words, options: words.allreduce([values], options))
        return values

    def all_gather(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's int64 values, by rank."""
        return [part.tolist() for part in self._gather(torch.tensor(list(values), dtype=torch.int64))]

    def gather_json(self, value: Any, what: str = "") -> list[Any]:
        """Every rank's value of numbers, texts, lists and dicts, by rank; for what is small. what it is: for errors."""
        data = json.dumps(value).encode()
        sizes = [int(size) for size in self._gather(torch.tensor([len(data)]), what)]
        told = self._gather(torch.frombuffer(bytearray(data.ljust(max(sizes))), dtype=torch.uint8), what)
        return [json.loads(part.numpy().tobytes()[:size]) for part, size in zip(told, sizes, strict=True)]

    def broadcast_json(self, value: Any, sender: int) -> Any:
        """One rank's such value on every rank; what the others give is not looked at."""
        data = json.dumps(value).encode() if self.rank == sender else b""
        size = self.all_gather([len(data)])[sender][0]
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(size, dtype=torch.uint8)
        options = BroadcastOptions()
        options.rootRank = sender
        self._collect(options, lambda words, options: words.broadcast([flat], options))
        return json.loads(flat.numpy().tobytes())

    def _gather(self, mine: Tensor, what: str = "") -> list[Tensor]:
        out = [torch.empty_like(mine) for _ in range(self.world)]
        self._collect(AllgatherOptions(), lambda words, options: words.allgather([out], [mine], options), what)
        return out

    def _collect(self, options: Any, start: Callable[[Any, Any], dist.Work], what: str = "") -> None:
        options.timeout = timedelta(seconds=self._left())
        self.wait(self._try(lambda open_: start(open_.words, options)), self._others(), what)

    def _open(self) -> connect.Connections:
        if self._connections is None:
            raise RuntimeError("this link is shut: call meet() on all ranks first")
        return self._connections

    def _try(self, call: Callable[[connect.Connections], T]) -> T:
        open_ = self._open()
        try:
            return call(open_)
        except (RuntimeError, ValueError) as error:
            raise self._stopped(self._others(), "", self._watch.after_error(_first_line(error))) from error

    def _until(self, done: Callable[[], bool], peers: Sequence[int], what: str, deadline: float | None = None) -> None:
        pause, deadline = _SHORTEST_PAUSE_S, deadline or self._deadline
        with self._watch.waiting(peers, what):
            while not done():
                if trouble := self._watch.trouble:
                    raise self._stopped(peers, what, trouble)
                if time.monotonic() > deadline:
                    late = self._watch.after_deadline(peers)
                    where = "; ".join(self._watch.table(late)) or "never seen"
                    raise self._stopped(
                        peers, what, Trouble(late, f"not there within {self._timeout_s} s, last seen: {where}")
                    )
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _stopped(self, peers: Sequence[int], what: str, trouble: Trouble) -> SyncStopped:
        """The error, told to the others, with the connections dropped and everything that is known in the log."""
        self._watch.fail(trouble.cause, trouble.ranks)
        self.shut()
        _log.error("weight sync stopped; the ranks were last seen:\n  %s", "\n  ".join(self._watch.table()))
        for rank, stack in self._watch.stacks(trouble.ranks).items():
            _log.error("stack of rank %d:\n%s", rank, stack)
        return SyncStopped(self._phase, self.rank, trouble.ranks or peers, what, trouble.cause)

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 1e-3)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world) if rank != self.rank]

    # --- at the store --------------------------------------------------------------------------------
    def _at_store(self, call: Callable[[], T], peers: Sequence[int]) -> T:
        """The answer of a call that a stopped host of the store may block for ever."""
        answers: list[T] = []
        errors: list[Exception] = []

        def ask() -> None:
            try:
                answers.append(call())
            except (RuntimeError, dist.DistError) as error:
                errors.append(error)

        thread = threading.Thread(target=ask, name="weight sync meeting", daemon=True)
        thread.start()
        self._until(lambda: not thread.is_alive(), peers, "", self._deadline + _RETIRE_S)
        if answers:
            return answers[0]
        raise self._stopped(peers, "", Trouble((0,), f"its store failed: {_first_line(errors[0])}")) from errors[0]

    def _next_epoch(self) -> int:
        return int(self._store.get("epoch")) if self._store.check(["epoch"]) else 0

    def _forget_earlier(self) -> None:
        """Remove what earlier meetings left: everybody has come to this one, and reads it no more."""
        left = [key for key in keys_there(self._store) if key.partition("/")[0].isdigit()]
        remove_keys(self._store, [key for key in left if int(key.partition("/")[0]) < self._epoch])

    def _retire(self) -> None:
        """Nobody meets in this epoch any more."""
        epoch, store = self._epoch, self._store

        def retire() -> None:
            with suppress(RuntimeError, dist.DistError):
                if self._next_epoch() <= epoch:
                    store.set("epoch", str(epoch + 1))

        thread = threading.Thread(target=retire, name="weight sync meeting", daemon=True)
        thread.start()
        thread.join(_RETIRE_S)

    def _gather_marks(self) -> list[dict[str, Any]] | _Absent:
        """What every rank says of itself at the meeting; or who has not come by the deadline."""
        epoch, store = self._epoch, self._store
        keys = [f"{self._epoch}/{rank}" for rank in range(self.world)]
        mark = {
            "broken": self._connections is None,
            "device": connect.device_identity(self.device),
            "machine": connect.machine_identity(),
        }
        store.set(keys[self.rank], json.dumps(mark))
        # One number to look at again and again, not a key of each rank.
        count, pause = f"{epoch}/count", _SHORTEST_PAUSE_S
        store.add(count, 1)
        while store.add(count, 0) < self.world and epoch == self._epoch and time.monotonic() < self._deadline:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_STORE_PAUSE_S)
        absent = _Absent(rank for rank, key in enumerate(keys) if not store.check([key]))
        return absent or [json.loads(text) for text in store.multi_get(keys)]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
