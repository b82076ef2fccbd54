"""Ends the Ray that a driver started once the driver is gone, however it went; run as a file, it is that process.

    driver ── pipe ──> reaper (a session of its own)
      gone: the pipe closes ──> everything that bears the driver's mark, with all it started, is killed

The mark is a variable in the environment of what `ray.init` starts: the head and the raylet. What the raylet starts are
its children; should it be gone first, its agents are left, which overwrite their environment with their title: they are
known by that, `ray::...`, and by files of Ray's session that they hold open. A driver that ends in good order closes
the pipe too, last: nothing is left then either.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

MARK = "RLHF_DIST_STARTED_BY"
LIMIT_S = 15.0
"""Longest that marked processes are looked for."""
GRACE_S = 0.5
"""Workers end by themselves when the raylet does, and free what they share."""


class Reaper:
    """The driver's end of it."""

    def __init__(self) -> None:
        self._mark = secrets.token_hex(16)
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, self._mark],  # -P: nothing that lies here or there is imported by mistake
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # what a terminal or a scheduler sends to the driver's group is not for it
        )

    @contextmanager
    def marking(self) -> Iterator[None]:
        """What is started inside bears the mark."""
        os.environ[MARK] = self._mark
        try:
            yield
        finally:
            os.environ.pop(MARK, None)

    def tell(self, session: str) -> None:
        """The folder of Ray's session, once it is known."""
        assert self._process.stdin is not None, "it is a pipe"
        with suppress(OSError):
            self._process.stdin.write(session.encode())
            self._process.stdin.flush()

    def end(self) -> None:
        """Kill what is left, and the reaper is gone too."""
        assert self._process.stdin is not None, "it is a pipe"
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LIMIT_S)


def reap(mark: str, session: str, limit_s: float = LIMIT_S) -> int:
    """Kill what bears the mark or is one of the session's, and all that it started; returns how many."""
    deadline, family = time.monotonic() + limit_s, dict[int, psutil.Process]()
    while time.monotonic() < deadline:
        marked = [process for process in psutil.process_iter() if _bears(process, mark) or _is_of(process, session)]
        for process in marked:
            with suppress(psutil.Error):
                family |= {one.pid: one for one in [process, *process.children(recursive=True)]}
        alive = [one for one in family.values() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            break
        for one in marked:
            with suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(alive, GRACE_S)
        for one in alive:
            with suppress(psutil.Error):
                one.kill()
    return len(family)


def _bears(process: psutil.Process, mark: str) -> bool:
    with suppress(psutil.Error, OSError):
        return bool(process.pid != os.getpid() and process.environ().get(MARK) == mark)
    return False


def _is_of(process: psutil.Process, session: str) -> bool:
    with suppress(psutil.Error, OSError):
        if session and process.cmdline()[:1] and process.cmdline()[0].startswith("ray::"):
            folder = f"/proc/{process.pid}/fd"
            return any(os.readlink(f"{folder}/{file}").startswith(f"{session}/") for file in os.listdir(folder))
    return False


if __name__ == "__main__":
    reap(sys.argv[1], sys.stdin.buffer.read().decode())
