"""The host's side of rewards: one child process that computes them, watched, ended at a limit and replaced.

    score(rows) -> send -> reports ... -> outcomes
                     |
                     +-- a call is too old, too much memory, the process ended  -> kill it and all it started;
                         the rows under way have failed, a new process does the rest

A function may therefore hang, leak, fork, exit or set alarms: it costs its row, not the run's process.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import psutil

from rlhf_dist.rewards.calls import NOT_CALLED, Outcome, Rows
from rlhf_dist.rewards.child import Limits, Report, Task
from rlhf_dist.rewards.environment import environment_of_reward
from rlhf_dist.rewards.load import LoadedReward
from rlhf_dist.rewards.rule import RewardFunctionError

START_S = 300.0
"""Longest that a function's imports and constructor may take."""
LOOK_S = 0.05
MEMORY_EVERY_S = 0.5
"""The child's own memory has a hard limit (RLIMIT_DATA); this one is for what it forks."""
LATE_S = 0.5
"""An async call ends itself at the limit; any other is ended by us a little later."""
ATTEMPTS = 3
"""Times that the process may end while nothing is under way."""
OUTPUT_BYTES = 256 << 10
"""What is kept of the output of one `score`."""
BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from rlhf_dist.rewards.child import main; main({}, {})"


class ScoringProcess:
    """A reward function in a process of its own."""

    def __init__(self, function: LoadedReward, limits: Limits, role: str = "reward") -> None:
        """Raises RewardFunctionError if the function's process does not come up."""
        self._function, self._signature, self._limits, self._role = function, function.signature, limits, role
        self._table = tempfile.TemporaryFile()
        self._child: _Child | None = None
        self._ready()

    def score(self, rows: Rows, num_rows: int, *, stop: bool = True) -> list[Outcome]:
        """The outcome of every row. `stop`: rows need not be called once one has failed."""
        outcomes: list[Outcome | None] = [None] * num_rows
        concurrency, unexplained = self._limits.concurrency, 0
        while True:
            left = [row for row, outcome in enumerate(outcomes) if outcome is None]
            if not left or (stop and any(isinstance(outcome, str) for outcome in outcomes)):
                return [NOT_CALLED if outcome is None else outcome for outcome in outcomes]
            taken = {name: [column[row] for row in left] for name, column in rows.items()}
            task = Task(rows=taken, num_rows=len(left), concurrency=concurrency, stop=stop)
            failure = self._run(task, left, outcomes)
            if failure is None:
                continue
            self.close()
            if not failure.rows:  # Nothing was under way: somebody else ended it, or what an earlier call left.
                unexplained += 1
                if unexplained > ATTEMPTS:
                    raise RewardFunctionError(
                        f"reward function {self._signature.name} {failure.text} between its calls"
                    )
                continue
            one_by_one = self._signature.batched or concurrency == 1
            if len(failure.rows) > 1 and not one_by_one and not stop:
                concurrency = 1  # Several calls were under way: one by one they show which it was.
                continue
            several = len(failure.rows) > 1 and not self._signature.batched
            for row in failure.rows:
                outcomes[row] = failure.text + (f", as one of rows {failure.rows}" if several else "")

    def close(self) -> None:
        """End the process and all it started."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _ready(self) -> _Child:
        if self._child is None or self._child.process.poll() is not None:
            self.close()
            self._child = _Child(self._table.fileno(), self._function, self._limits)
            failure = self._child.wait_until_ready()
            if failure is not None:
                self.close()
                raise RewardFunctionError(f"reward function {self._signature.name} could not be set up: {failure}")
        return self._child

    def _run(self, task: Task, left: list[int], outcomes: list[Outcome | None]) -> _Failure | None:
        """Have the child do a task, the rows `left`. Fills in `outcomes`; returns what ended it early."""
        child = self._ready()
        if os.fstat(self._table.fileno()).st_size < 8 * task.num_rows:
            os.ftruncate(self._table.fileno(), 8 * task.num_rows)
        started: Any = np.frombuffer(mmap.mmap(self._table.fileno(), 8 * task.num_rows), np.float64)
        started[:] = 0.0
        child.output.allow(OUTPUT_BYTES)
        with contextlib.suppress(OSError):  # It has ended meanwhile, which is seen below.
            child.connection.send(task)
        looked = time.monotonic()
        while True:
            ended = child.process.poll()
            for report in child.reports(0.0 if ended is not None else LOOK_S):
                for finished in report.finished:
                    which = left if self._signature.batched else [left[finished.call]]
                    for row, outcome in zip(which, finished.outcomes, strict=True):
                        outcomes[row] = outcome
                if report.over:
                    if any(finished.out_of_memory for finished in report.finished):
                        self.close()
                    return None
            now = time.monotonic()
            calls, text = under_way(started, now - self._limits.timeout_s - LATE_S), ""
            if ended is not None:
                calls, text = under_way(started), _ending(ended)
            elif len(calls):
                text = f"did not return within {self._role}.timeout_s={self._limits.timeout_s:g} s"
            elif now - looked > MEMORY_EVERY_S:
                looked, used = now, child.memory_bytes()
                if used > self._limits.memory_bytes:
                    calls = under_way(started)
                    text = (
                        f"took {used >> 20} MiB with what it started, more than {self._role}.memory_bytes="
                        f"{self._limits.memory_bytes}"
                    )
            if text:
                rows = left if self._signature.batched and len(calls) else [left[call] for call in calls]
                return _Failure(text, [row for row in rows if outcomes[row] is None])


def under_way(started: npt.NDArray[np.float64], before: float = math.inf) -> npt.NDArray[np.int64]:
    """Calls that began before a time and have not returned. started: [calls], 0 for one that is not under way.

    The child writes it meanwhile, so it is read once: what returns between two looks would have begun at 0, long ago.
    """
    seen = np.array(started)
    return np.flatnonzero((seen > 0) & (seen < before))


@dataclass(frozen=True)
class _Failure:
    text: str
    rows: list[int]


class _Child:
    def __init__(self, table: int, function: LoadedReward, limits: Limits) -> None:
        self.connection, theirs = Pipe()
        command = [
            sys.executable,
            "-c",
            BOOT.format(theirs.fileno(), table),
            json.dumps([*sys.path, *function.folders]),
        ]
        try:
            environment = environment_of_reward(os.environ, limits.environment)
        except ValueError as error:
            raise RewardFunctionError(str(error)) from error
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(), table),
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        assert self.process.stdout is not None, "it is a pipe"
        self.output = _Output(self.process.stdout)
        self.connection.send((function.payload, function.signature, limits))

    def wait_until_ready(self) -> str | None:
        """Why it is not ready, or None."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            ended = self.process.poll()
            with contextlib.suppress(EOFError, OSError):
                if self.connection.poll(0.0 if ended is not None else LOOK_S):
                    failure: str | None = self.connection.recv()
                    return failure
            if ended is not None:
                return f"it {_ending(ended)}; see the log"
        return f"its imports and constructor took more than {START_S:g} s"

    def reports(self, timeout_s: float) -> Iterator[Report]:
        """Those that have come, after a wait of at most `timeout_s` for the first."""
        with contextlib.suppress(EOFError, OSError):
            while self.connection.poll(timeout_s):
                yield self.connection.recv()
                timeout_s = 0.0

    def memory_bytes(self) -> int:
        """Memory of the process and all it started, shared pages counted once."""
        total = 0
        for process in self._family():
            with contextlib.suppress(psutil.Error, OSError):
                total += int(process.memory_full_info().pss)
        return total

    def kill(self) -> None:
        family = self._family()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()
        self.connection.close()

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        return []


class _Output:
    """Copies what a child prints to our own output, up to what is allowed; the rest is read and left out."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe, self._left, self._dropped = pipe, OUTPUT_BYTES, 0
        threading.Thread(target=self._drain, name="reward-output", daemon=True).start()

    def allow(self, count: int) -> None:
        """From now on `count` bytes more are kept."""
        dropped, self._dropped, self._left = self._dropped, 0, count
        if dropped:
            self._write(f"\n[{dropped} bytes of the reward function's output left out]\n".encode())

    def _drain(self) -> None:
        with self._pipe:
            while text := os.read(self._pipe.fileno(), 1 << 16):
                self._write(text[: self._left])
                self._dropped += max(0, len(text) - self._left)
                self._left = max(0, self._left - len(text))

    def _write(self, text: bytes) -> None:
        with contextlib.suppress(OSError):
            while text:
                text = text[os.write(1, text) :]


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended its process (exit code {code}), which a reward function must not"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"ended its process by {name} (a crash, an alarm that nothing handles, or the machine out of memory)"
