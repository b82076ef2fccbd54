"""What every rank of a link is doing, told through the store, so that whoever waits can name who does not come.

    this rank    enters a phase, starts an operation, fails ──> record RANK, at most 5 times a second
                 does nothing new                           ──> the same record with a new beat, every BEAT_S
    a rank that waits reads all records:
        one says "failed" ──────────────> stop, with its reason
        one has had no beat for SILENCE_S ──> stop: that process is stopped, dead or cut off
        all beat ───────────────────────> wait on, to the deadline; who is not waiting by then is the one to look at

A thread of its own does it, so that a rank beats while it computes, and so that a store whose host is stopped blocks
this thread and not the sync: then it is the host, rank 0, that is silent.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch.distributed as dist

_log = logging.getLogger(__name__)

SILENCE_S = 40.0
"""Without a beat for so long a rank counts as gone. Well above what a process may be held up (one call that keeps the
interpreter's lock), and below the minute in which a stall should have a name."""
BEAT_S = 5.0
STACKS = "RLHF_DIST_STACKS"
"""Environment variable: set to 1, whoever names a rank of its own machine logs that rank's stack, by py-spy."""
_GAP_S, _READ_S, _GRACE_S = 0.2, 1.0, 1.5
"""Least time between two records; between two readings while waiting; for the reasons of others after an error."""
_HOST = 0
"""The rank whose process hosts the store."""


@dataclass(frozen=True)
class Record:
    """Where one rank is."""

    beat: int = 0
    epoch: int = -1
    """Of the link's meetings."""
    step: int = 0
    """Operations of this epoch it has started; all ranks start the same ones."""
    phase: str = "idle"
    what: str = ""
    """Round and parameters, where there are any."""
    waits: tuple[int, ...] = ()
    """Ranks it waits for; none: it computes."""
    failed: str = ""
    """Why it gave up in this epoch."""
    blames: tuple[int, ...] = ()
    """Which ranks it gave up for; itself where the failure was its own."""
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)

    @classmethod
    def parse(cls, text: bytes) -> Record:
        """From JSON."""
        fields = json.loads(text)
        return cls(**fields | {"waits": tuple(fields["waits"]), "blames": tuple(fields["blames"])})

    def show(self, rank: int) -> str:
        """One line."""
        doing = f"{self.phase}{f', {self.what}' if self.what else ''}"
        waits = f", waiting for {_ranks(self.waits)}" if self.waits else ""
        return f"rank {rank} (pid {self.pid} on {self.host}) in {doing}{waits}"


@dataclass(frozen=True)
class Trouble:
    """Why waiting is in vain."""

    ranks: tuple[int, ...]
    cause: str
    epoch: int = -1
    """In which it was read."""


class Watch:
    """One rank's record, and what it has read of the others'."""

    def __init__(self, store: dist.Store, rank: int, world: int, silence_s: float = SILENCE_S) -> None:
        """store: a connection that nothing else uses. Nothing is told before `start`."""
        self._store, self._rank, self._world, self._silence_s = store, rank, world, silence_s
        self._beat_s = min(BEAT_S, silence_s / 4)
        # All ranks read all records: at 512 ranks every 10 s.
        self._read_s = max(_READ_S, world / 50)
        self._mine, self._beat = Record(), 0
        self._seen: dict[int, tuple[Record, float]] = {}
        """Rank -> its last record, and when its beat was new."""
        self._read_at = self._asked_at = 0.0
        self._calling_since: float | None = None
        self._waiting_since: float | None = None
        self._trouble: Trouble | None = None
        self._changed, self._closed = threading.Event(), False
        self._thread: threading.Thread | None = None

    def start(self, epoch: int) -> None:
        """A new epoch begins."""
        self._mine = replace(self._mine, epoch=epoch, step=0, waits=(), failed="", blames=())
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="weight sync watch", daemon=True)
            self._thread.start()
        self._changed.set()

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._changed.set()

    def enter(self, phase: str, what: str = "") -> None:
        """This rank goes on to something else."""
        self._mine = replace(self._mine, phase=phase, what=what, step=self._mine.step + 1)
        self._changed.set()

    @contextmanager
    def waiting(self, ranks: Sequence[int], what: str) -> Iterator[None]:
        """This rank waits for others."""
        self._mine = replace(self._mine, waits=tuple(ranks), what=what, step=self._mine.step + 1)
        self._waiting_since = time.monotonic()
        self._changed.set()
        try:
            yield
        finally:
            self._waiting_since = None
            self._mine = replace(self._mine, waits=())

    def fail(self, cause: str, blames: Sequence[int]) -> None:
        """This rank gives up the epoch; the first reason that names somebody counts."""
        if not self._mine.blames:
            self._mine = replace(self._mine, failed=cause or "?", blames=tuple(blames))
            self._changed.set()

    @property
    def trouble(self) -> Trouble | None:
        """A reason not to wait any longer, if one was read."""
        since = self._calling_since
        if since is not None and time.monotonic() - since > self._silence_s:
            return Trouble((_HOST,), f"the store in its process has not answered for {self._silence_s:g} s")
        found = self._trouble
        return found if found is not None and found.epoch == self._mine.epoch else None

    def after_deadline(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Of those this rank has waited for, who keeps it waiting: who is silent, computes, or is behind."""
        self._read_again(_GRACE_S)
        if since := self._calling_since:
            if time.monotonic() - since > _GRACE_S:
                return (_HOST,)
        others = {rank: record for rank, (record, _) in self._seen.items() if rank in ranks}
        mine = self._mine
        late = [rank for rank, (_, at) in self._seen.items() if rank in ranks and self._read_at - at > 2 * self._beat_s]
        busy = [rank for rank, one in others.items() if one.epoch != mine.epoch or not (one.waits or one.failed)]
        least = min((one.step for one in others.values()), default=mine.step)
        behind = [rank for rank, one in others.items() if one.step == least < mine.step]
        return tuple(late or busy or behind or ranks)

    def after_error(self, cause: str) -> Trouble:
        """Why a connection has failed: the reason of the rank that failed first, or who has nothing to say."""
        self.fail(cause, ())
        until, told = time.monotonic() + _GRACE_S, set[int]()
        while time.monotonic() < until:
            self._read_again(until - time.monotonic())
            if found := self._failure():
                return found
            told = {rank for rank, (one, _) in self._seen.items() if one.epoch == self._mine.epoch and one.failed}
            time.sleep(_GAP_S)
        silent = [rank for rank in range(self._world) if rank not in told and rank != self._rank]
        return Trouble(tuple(silent) or self._others(), cause)

    def table(self, ranks: Sequence[int] | None = None) -> list[str]:
        """Where ranks were when last read, a line each."""
        seen = {rank: record for rank, (record, _) in self._seen.items()} | {self._rank: self._mine}
        return [seen[rank].show(rank) for rank in sorted(seen) if ranks is None or rank in ranks]

    def stacks(self, ranks: Sequence[int]) -> dict[int, str]:
        """Rank -> its stack, of those on this machine; empty where it was not asked for (`STACKS`)."""
        if os.environ.get(STACKS, "0") in ("", "0"):
            return {}
        here = {rank: self._seen[rank][0] for rank in ranks if rank in self._seen and rank != self._rank}
        return {rank: stack_of(one.pid) for rank, one in here.items() if one.host == self._mine.host}

    def _others(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(self._world) if rank != self._rank)

    # --- the thread ----------------------------------------------------------------------------------
    def _run(self) -> None:
        while not self._closed:
            self._changed.wait(self._beat_s if self._waiting_since is None else min(self._read_s, self._beat_s))
            self._changed.clear()
            if self._calling_since is None:
                self._calling_since = time.monotonic()
            try:
                self._tell()
                if self._asked_at > self._read_at or self._waits_long():
                    self._read()
                    self._trouble = self._failure() or self._silence()
            except (RuntimeError, dist.DistError, ValueError, TypeError) as error:
                _log.debug("the store does not answer: %s", error)  # its host is gone: `trouble` says so in time
                time.sleep(self._beat_s)
                continue
            self._calling_since = None
            time.sleep(_GAP_S)

    def _waits_long(self) -> bool:
        since, now = self._waiting_since, time.monotonic()
        return since is not None and now - since > _READ_S and now - self._read_at > self._read_s

    def _tell(self) -> None:
        self._beat += 1
        self._store.set(str(self._rank), json.dumps(asdict(replace(self._mine, beat=self._beat))))

    def _read(self) -> None:
        keys = [str(rank) for rank in range(self._world)]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        texts, now = self._store.multi_get(keys), time.monotonic()
        # Nobody looked for a while: a beat that is old may have come right after.
        fresh = now - self._read_at > 2 * self._read_s + self._beat_s
        for key, text in zip(keys, texts, strict=True):
            record, before = Record.parse(text), self._seen.get(int(key))
            same = before is not None and before[0].beat == record.beat and not fresh
            self._seen[int(key)] = (record, before[1] if same and before is not None else now)
        self._read_at = now

    def _read_again(self, at_most_s: float) -> None:
        self._asked_at = time.monotonic()
        self._changed.set()
        until = self._asked_at + at_most_s
        while self._read_at < self._asked_at and time.monotonic() < until:
            time.sleep(0.01)

    def _failure(self) -> Trouble | None:
        """What another rank knows of the end of this epoch."""
        for rank, (one, _) in sorted(self._seen.items()):
            if one.epoch != self._mine.epoch or not one.failed or rank == self._rank or not one.blames:
                continue
            if one.blames == (self._rank,):
                return Trouble((rank,), "the others have stopped waiting for this rank", one.epoch)
            return Trouble(one.blames, one.failed, one.epoch)
        return None

    def _silence(self) -> Trouble | None:
        gone = {rank: now for rank, (_, at) in self._seen.items() if (now := self._read_at - at) > self._silence_s}
        gone.pop(self._rank, None)
        if not gone:
            return None
        where = "; ".join(self._seen[rank][0].show(rank) for rank in gone)
        return Trouble(tuple(gone), f"no word for {min(gone.values()):.0f} s, last seen: {where}", self._mine.epoch)


def stack_of(pid: int) -> str:
    """What py-spy says of a process of this machine, without halting it; or why it says nothing."""
    beside = Path(sys.executable).parent / "py-spy"
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    if found is None:
        return "py-spy is not installed"
    try:
        said = subprocess.run(
            [found, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=10, check=False
        )
    except subprocess.TimeoutExpired:
        return "py-spy did not answer within 10 s"
    return (said.stdout or said.stderr).strip()


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) != 1 else ''} {shown}"
