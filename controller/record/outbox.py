"""Rows on their way to a tracker: from a thread of its own, so that no tracker delays a run or ends it.

log(step, metrics) ──> queue ──> thread: make the tracker, then tracker.log(step, metrics)
                                   │ it raises, or has raised less than RETRY_S ago
                                   └──> NAME_missed.jsonl beside the run, said once
close() ──> waits while rows are delivered, CLOSE_S at most for the next; the rest is kept as well
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from rlhf_dist.failure import text_of

Row = tuple[int, dict[str, float]]

RETRY_S = 60.0
"""Between two attempts at a tracker that failed; rows in between are kept without asking it."""
CLOSE_S = 60.0
"""Longest wait for a row to be delivered when the run ends; the first one loads a tracker's library."""


class Tracker(Protocol):
    """Where a step's metrics also go. Calls may raise anything and take any time."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Finite metrics of one step."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


class Outbox:
    """Delivers rows to one tracker, in order; itself a Tracker that never raises and never waits but in `close`."""

    def __init__(self, name: str, make: Callable[[], Tracker], folder: Path, tell: Callable[[str], None]) -> None:
        """make: called in the thread, again after a failure. folder: of the run. tell: shows a line to people."""
        self._name, self._make, self._tell = name, make, tell
        self._missed = folder / f"{name}_missed.jsonl"
        self._rows: queue.Queue[Row | None] = queue.Queue()
        self._lock = threading.Lock()
        self._at: Row | None = None
        self._tracker: Tracker | None = None
        self._again_s = 0.0
        self._told = self._closed = self._left = False
        self._progress_s = time.monotonic()
        self._thread = threading.Thread(target=self._deliver, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See Tracker; returns at once."""
        self._rows.put((step, dict(metrics)))

    def close(self, wait_s: float | None = None) -> None:
        """Wait for what is on its way, `wait_s` (None: CLOSE_S) at most for the next row; what does not arrive is
        kept. Calling it again does nothing."""
        wait_s = CLOSE_S if wait_s is None else wait_s
        if self._closed:
            return
        self._closed = True
        self._rows.put(None)
        self._progress_s = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - self._progress_s < wait_s:
            self._thread.join(0.2)
        with self._lock:
            self._left = True
            rows = [self._at, *_drained(self._rows)] if self._thread.is_alive() else []
        kept = [row for row in rows if row is not None]
        for row in kept:
            self._keep(row)
        if kept:
            self._say(f"no answer within {wait_s:g} s")

    def _deliver(self) -> None:
        while (row := self._rows.get()) is not None:
            with self._lock:
                self._at = row
            delivered = self._attempt(row)
            with self._lock:
                if self._left:
                    return
                self._at = None
                if not delivered:
                    self._keep(row)
            self._progress_s = time.monotonic()
        if self._tracker is not None:
            self._attempt(None)

    def _attempt(self, row: Row | None) -> bool:
        """Whether the tracker took the row (None: closed)."""
        if time.monotonic() < self._again_s:
            return False
        try:
            self._tracker = self._tracker or self._make()
            if row is None:
                self._tracker.close()
            else:
                self._tracker.log(*row)
            return True
        except Exception as error:  # whatever a library raises, the run goes on
            self._again_s = time.monotonic() + RETRY_S
            self._say(text_of(error))
            return False

    def _keep(self, row: Row) -> None:
        with contextlib.suppress(OSError), self._missed.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": row[0], **row[1]}) + "\n")

    def _say(self, why: str) -> None:
        if not self._told:
            self._told = True
            reason = " ".join(why.split())
            misses = f"what {self._name} misses is kept in {self._missed}"
            self._tell(f"{self._name} fails: {reason[:300]}; the run goes on, {misses}")


def _drained(rows: queue.Queue[Row | None]) -> list[Row | None]:
    found = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(rows.get_nowait())
    return found
