"""Who writes to a run's folder: a lock of the kernel where the file system has locks, and a record of the owner.

.lock   {"host": "node-3", "pid": 4711, "started": 1764370000.5, "boot": "9f0c...", "since": "2026-11-28 22:15:03"}
        flock held while the run lasts; the kernel lets it go with the process, however that ends
        touched every BEAT_S: for other hosts, where the file system has no locks, or keeps them to one host

flock held by another process                          live
record of this host: this boot, and that process       live; else stale
record of another host: beat younger than STALE_S      may be live: a start waits and watches; older: stale
no record (the run ended and took it away)             free
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

LOCK = ".lock"
BEAT_S = 10.0
"""Between two signs of life."""
STALE_S = 60.0
"""Without one, a run of another host has ended; a driver that stands still for so long has lost its run anyway."""


class FolderTaken(Exception):
    """A run holds the folder; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process of a run."""

    host: str
    pid: int
    started: float
    """When the process started, seconds since 1970: a pid is used again, the two together are not."""
    boot: str
    """Of the kernel: other after a restart of the machine, so that no process of before can be alive."""
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def this_process() -> Owner:
    """The owner that this process is."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    started = psutil.Process().create_time()
    return Owner(host=socket.gethostname(), pid=os.getpid(), started=started, boot=_boot(), since=now)


def state_of(owner: Owner, here: Owner, started: float | None, age_s: float) -> str:
    """`live`, `stale`, or `watch`: whether beats still come decides.

    here: the process that asks. started: when the process of the owner's pid on this host started; None where there
    is none. age_s: since the last beat.
    """
    if owner.host == here.host and owner.boot == here.boot:
        return "live" if started is not None and abs(started - owner.started) < 1.0 else "stale"
    if owner.host == here.host:
        return "stale"
    return "watch" if age_s < STALE_S else "stale"


def owner_of(folder: Path) -> tuple[str, str]:
    """(state, owner as text) of a folder: `free`, `live`, `stale` or `watch`."""
    path = folder / LOCK
    if not path.is_file():
        return "free", ""
    with path.open(encoding="utf-8", errors="replace") as file:
        held = not _locked(file, fcntl.LOCK_SH)
        owner = _parsed(file.read())
    if held:
        return "live", str(owner or "its owner is not known")
    if owner is None:
        return "free", ""
    return state_of(owner, this_process(), _started(owner.pid), _age_s(path)), str(owner)


@contextmanager
def held(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder. Raises FolderTaken where a run has it, at once or once its beat was seen; OSError."""
    _watch(folder, note)
    lock = _lock(folder)
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(lock, ended), name="run-folder-beat", daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join(BEAT_S)
        with suppress(OSError):  # a disk that is full or gone: the lock goes with the file all the same
            lock.truncate(0)
        lock.close()


def _watch(folder: Path, note: Callable[[str], None]) -> None:
    """Wait until another host's run has given no sign of life for STALE_S. Raises FolderTaken if it gives one."""
    state, owner = owner_of(folder)
    if state != "watch":
        return
    path = folder / LOCK
    beat, deadline = path.stat().st_mtime, time.monotonic() + STALE_S
    note(f"{folder} was held by {owner}, another host; waiting up to {STALE_S:g} s to see whether it still runs")
    while state == "watch" and time.monotonic() < deadline:
        time.sleep(min(1.0, STALE_S / 20))
        state, owner = owner_of(folder)
        if path.is_file() and path.stat().st_mtime != beat:
            raise FolderTaken(owner)


def _lock(folder: Path) -> IO[str]:
    file = (folder / LOCK).open("a+", encoding="utf-8")
    for left in (2, 1, 0):  # `rlhf-dist check` looks at the lock for a moment.
        if _locked(file, fcntl.LOCK_EX):
            break
        if not left:
            file.close()
            raise FolderTaken(owner_of(folder)[1])
        time.sleep(0.1)
    state, owner = owner_of(folder) if _without_locks(file) else ("free", "")
    if state == "live":
        file.close()
        raise FolderTaken(owner)
    file.truncate(0)
    file.write(json.dumps(asdict(this_process())))
    file.flush()
    return file


def _beat(lock: IO[str], ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with suppress(OSError):  # said by what else is written there
            os.utime(lock.fileno())


def _parsed(text: str) -> Owner | None:
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _started(pid: int) -> float | None:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(int(psutil.boot_time()))


def _age_s(path: Path) -> float:
    """Since the last beat, by the clock of the file system: those of hosts differ."""
    probe = path.with_name(f"{LOCK}.{os.getpid()}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        now = time.time()
    return now - path.stat().st_mtime


def _locked(file: IO[str], kind: int) -> bool:
    """Whether the lock was free; True too on file systems that have no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _without_locks(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return False


_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
