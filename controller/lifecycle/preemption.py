"""A scheduler wants its machines back, or a person wants a checkpoint now.

SIGTERM, or the notice file appears
  ├─ the step under way ends within half of output.notice_s ──> checkpoint ──> exit code 75
  └─ it does not ──> it is abandoned: a checkpoint of the steps before it where it has not changed a weight yet,
                     else the last one stands ──> exit code 75
SIGTERM again           ends at once; exit code 130
SIGTERM before a step   there is nothing to save: ends at once; exit code 75
SIGUSR1                 a checkpoint at the end of this step, and on
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

EXIT_CODE = 75
"""Of a run that was preempted: EX_TEMPFAIL, to be started again with resume=auto."""
NOTICE_FILE = "RLHF_DIST_NOTICE_FILE"
"""Environment variable with the path of a notice file, for schedulers that know nothing of settings."""
LOOK_S = 1.0
"""Between two looks for the file."""


class Preempted(KeyboardInterrupt):
    """The run was asked to make room, and does: what an interrupt passes through, this does."""


class Notices:
    """What a run was asked from outside."""

    def __init__(self, file: str | None, notice_s: float) -> None:
        """file: `output.notice_file`; None: what the environment says. notice_s: from a notice to the end."""
        named = file or os.environ.get(NOTICE_FILE)
        self._file = Path(named).expanduser() if named else None
        self._notice_s = notice_s
        self._began, self._looked_s, self._asked_s = time.time(), float("-inf"), 0.0
        self.asked = ""
        """By what the run was asked to end; empty: it was not."""
        self.wants_checkpoint = False
        """One at the end of this step."""
        self.at_once = False
        """The run was asked twice: nothing is waited for."""
        self.running = False
        """Steps are under way: a notice lets the step end."""

    @contextmanager
    def heard(self) -> Iterator[Notices]:
        """Listen to signals. To be entered after Ray has started, which sets handlers of its own."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {
            number: signal.signal(number, handler)
            for number, handler in ((signal.SIGTERM, self._on_term), (signal.SIGUSR1, self._on_user))
        }
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def look(self) -> bool:
        """Whether the run was asked to end."""
        now = time.monotonic()
        if not self.asked and self._file is not None and now - self._looked_s > LOOK_S:
            self._looked_s = now
            try:
                new = self._file.stat().st_mtime >= self._began - LOOK_S  # one of an earlier start asks nothing
            except OSError:
                new = False
            if new:
                self._ask(f"the notice file {self._file}")
        return bool(self.asked)

    def check(self) -> None:
        """Raises Preempted where a step has taken too long to end since the run was asked."""
        if self.running and self.look() and self.left_s < self._notice_s / 2:
            raise Preempted(self.asked)

    @property
    def left_s(self) -> float:
        """Seconds until the run should have ended."""
        return self._asked_s + self._notice_s - time.monotonic()

    def _ask(self, by: str) -> None:
        self.asked, self._asked_s = by, time.monotonic()

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self.at_once = True
            raise KeyboardInterrupt
        self._ask("SIGTERM")
        if not self.running:
            raise Preempted("SIGTERM, with no step under way: nothing had to be saved")

    def _on_user(self, number: int, frame: FrameType | None) -> None:
        self.wants_checkpoint = True
