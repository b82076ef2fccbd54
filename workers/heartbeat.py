"""What this process is at, for a watcher that asks while calls are under way.

    call ── begins, ends ──> Activity <── beat, in a concurrency group of its own ── controller

Nothing is recorded inside an op: where it stands is read from its thread's frames when somebody asks.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rlhf_dist.heartbeat import Beat, Doing, stacks_of
from rlhf_dist.process_state import Exits, parent_of

WAITING = (
    "/torch/distributed/distributed_c10d.py",
    "/torch/distributed/c10d_logger.py",
    "/torch/distributed/_functional_collectives.py",
    "/workers/reshard/link.py",
)
"""Ends of the files in which a thread stands while it waits for other ranks."""
WRAPPER = "wrapper"
"""A function of c10d_logger.py around each collective."""
LIBRARIES = ("/site-packages/", "/lib/python")


@dataclass(frozen=True)
class _Noted:
    op: str
    step: int | None
    thread: int
    started_s: float


class Activity:
    """The calls that this process is at, by thread, and what it sees of its neighbours."""

    def __init__(self) -> None:
        self._noted: dict[int, _Noted] = {}
        self._exits = Exits()

    @contextmanager
    def noted(self, op: str, step: int | None) -> Iterator[None]:
        """A call under way in this thread; calls inside it belong to it."""
        thread = threading.get_ident()
        if thread in self._noted:
            yield
            return
        self._noted[thread] = _Noted(op, step, thread, time.monotonic())
        try:
            yield
        finally:
            del self._noted[thread]

    def watch(self, pids: Sequence[int]) -> None:
        """Processes of this machine whose end this one is to see, and those that started them."""
        self._exits.watch([*pids, *(parent for pid in pids if (parent := parent_of(pid)) is not None and parent > 1)])

    def beat(self, about: Sequence[int], stacks: bool) -> Beat:
        """about: neighbours (pids) to look at."""
        now, frames = time.monotonic(), sys._current_frames()
        noted = sorted(self._noted.copy().values(), key=lambda one: one.started_s)
        doing = []
        for one in noted:
            place, waits = place_of(frames.get(one.thread))
            doing.append(Doing(op=one.op, step=one.step, seconds=now - one.started_s, place=place, waits=waits))
        seen = {pid: state for pid in about if (state := self._exits.state(pid)) is not None}
        own = threading.get_ident()
        told = {thread: frame for thread, frame in frames.items() if thread != own} if stacks else {}
        return Beat(doing=tuple(doing), seen=seen, stacks=stacks_of(told))


def place_of(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread stands, and whether it waits for other ranks there: the collective, else the innermost line that
    is no library's, else the innermost."""
    innermost = frame
    found: FrameType | None = None
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith(WAITING):
            return _entered(frame), True
        if found is None and not any(part in code.co_filename for part in LIBRARIES):
            found = frame
        frame = frame.f_back
    at = found or innermost
    if at is None:
        return "", False
    return f"{Path(at.f_code.co_filename).name}:{at.f_lineno} in {at.f_code.co_name}", False


def _entered(frame: FrameType) -> str:
    """The function by which a thread came into those files: `all_gather`, not what that calls."""
    at: FrameType | None = frame
    name = frame.f_code.co_name
    while at is not None and at.f_code.co_filename.endswith(WAITING):
        name = name if at.f_code.co_name == WRAPPER else at.f_code.co_name
        at = at.f_back
    return name
