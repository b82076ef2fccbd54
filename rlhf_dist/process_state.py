"""How processes of this machine stand, and how they ended, for one that did not start them.

    watched pids ──pidfd──> poll, in a thread of its own ──> the moment of a process's end, and its status

A parent learns how a child ended; a worker's parent is Ray's raylet, which does not say. The kernel tells whoever held
a pidfd (Linux 6.15 and later) or looks while the process is still a zombie. Elsewhere the status is None.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

_GET_INFO = 0xC0000000 | 64 << 16 | 0xFF << 8 | 11
"""_IOWR(0xFF, 11, struct pidfd_info), its first version of 64 bytes (linux/pidfd.h)."""
_INFO_EXIT = 1 << 3
_STATUS_S = 1.0
"""Longest wait for a status between a process's end and its parent's look at it."""
_TICK_S = 1.0
"""The thread looks for new pids so often."""


@dataclass(frozen=True, kw_only=True)
class ProcessState:
    """What the kernel says of a process."""

    alive: bool
    letter: str = ""
    """Of a living one, as in /proc/PID/stat: R runs, S sleeps, D waits for a device, T is stopped."""
    ended_at: float = 0.0
    """Seconds since the epoch, of one that has ended while it was watched."""
    status: int | None = None
    """As `os.wait` gives it; None where it is not known."""
    out_of_memory: bool = False
    """The kernel has killed some process of this machine for want of memory since the one before it ended."""

    @property
    def stopped(self) -> bool:
        """By SIGSTOP, a terminal or a debugger."""
        return self.alive and self.letter in ("T", "t")

    @property
    def text(self) -> str:
        """For people."""
        if self.alive:
            return "is stopped (SIGSTOP, or a debugger)" if self.stopped else "runs"
        if self.status is None:
            return "ended, how is not known" + (_OUT_OF_MEMORY if self.out_of_memory else "")
        if not os.WIFSIGNALED(self.status):
            return f"ended with exit code {os.waitstatus_to_exitcode(self.status)}"
        number = os.WTERMSIG(self.status)
        killed = number == signal.SIGKILL and self.out_of_memory
        return f"was killed by signal {number} ({signal_name(number)})" + (_OUT_OF_MEMORY if killed else "")


_OUT_OF_MEMORY = ": the kernel was out of memory, of the machine or of its control group"


class Exits:
    """Watches processes of this machine from before their end."""

    def __init__(self) -> None:
        self._pidfds: dict[int, int] = {}
        self._ended: dict[int, ProcessState] = {}
        self._killed = oom_kills()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def watch(self, pids: Iterable[int]) -> None:
        """From now on; those that are watched already are left as they are."""
        with self._lock:
            for pid in pids:
                if pid not in self._pidfds and pid not in self._ended:
                    with suppress(OSError):
                        self._pidfds[pid] = os.pidfd_open(pid)
            if self._thread is None and self._pidfds:
                self._thread = threading.Thread(target=self._run, name="exits", daemon=True)
                self._thread.start()

    def forget(self) -> None:
        """Watch nothing any more."""
        with self._lock:
            for pidfd in self._pidfds.values():
                os.close(pidfd)
            self._pidfds.clear()
            self._ended.clear()

    def state(self, pid: int) -> ProcessState | None:
        """Of a watched process; None for one that was never seen alive here."""
        with self._lock:
            if pid in self._ended:
                return self._ended[pid]
            if pid not in self._pidfds:
                return None
        letter = _stat(pid)[0]
        if letter in ("", "Z", "X"):  # ended, and the thread has not said so yet
            return self._end(pid, time.time())
        return ProcessState(alive=True, letter=letter)

    def ended(self) -> dict[int, ProcessState]:
        """Those that have ended while they were watched."""
        with self._lock:
            return dict(self._ended)

    def _run(self) -> None:
        while True:
            with self._lock:
                pid_of = {pidfd: pid for pid, pidfd in self._pidfds.items()}
            if not pid_of:
                time.sleep(_TICK_S)
                continue
            poll = select.poll()
            for pidfd in pid_of:
                poll.register(pidfd, select.POLLIN)
            for pidfd, _ in poll.poll(1000 * _TICK_S):
                self._end(pid_of[pidfd], time.time())

    def _end(self, pid: int, at: float) -> ProcessState:
        with self._lock:
            if pid in self._ended or pid not in self._pidfds:
                return self._ended.get(pid, ProcessState(alive=False, ended_at=at))
            pidfd = self._pidfds.pop(pid)
            status = _status(pid, pidfd)
            os.close(pidfd)
            killed = self._killed
            if status is None or os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                self._killed = oom_kills()  # one that ended otherwise is not the one that the kernel chose
            out_of_memory = self._killed > killed
            self._ended[pid] = ProcessState(alive=False, ended_at=at, status=status, out_of_memory=out_of_memory)
            return self._ended[pid]


def signal_name(number: int) -> str:
    """SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def parent_of(pid: int) -> int | None:
    """Of a living process of this machine."""
    fields = _stat(pid)[1]
    return int(fields[1]) if len(fields) > 1 else None


def oom_kills() -> int:
    """Processes that the kernel has killed for want of memory, of the machine or a control group, since it started."""
    with suppress(OSError, ValueError):
        with open("/proc/vmstat", encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    return 0


def _stat(pid: int) -> tuple[str, list[str]]:
    """The letter of a process's state and the fields from there on; "" where there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "", []
    return (fields[0], fields) if fields else ("", [])


def _status(pid: int, pidfd: int) -> int | None:
    """How the process behind `pidfd`, which has ended, did so."""
    deadline = time.monotonic() + _STATUS_S
    while True:
        letter, fields = _stat(pid)
        if letter == "Z" and len(fields) > 49 and fields[49] != "0":  # 0 is also what others than root may see
            return int(fields[49])
        if letter in ("", "X") and sys.platform == "linux":
            info = bytearray(struct.pack("Q56x", _INFO_EXIT))
            try:
                fcntl.ioctl(pidfd, _GET_INFO, info)
                if struct.unpack_from("Q", info)[0] & _INFO_EXIT:
                    return int(struct.unpack_from("i", info, 60)[0])
            except OSError as error:
                if error.errno in (errno.ENOTTY, errno.EINVAL):  # an older kernel
                    return None
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)
