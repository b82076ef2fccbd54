"""Watching a program from the first process of its sandbox: what it writes, how long it runs, how much it takes."""

from __future__ import annotations

import os
import select
import signal
import time
from dataclasses import dataclass, field
from typing import Any

LOOK_S = 0.02
"""How often memory is looked at."""
CHUNK = 1 << 16
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Streams:
    """Our ends of a program's pipes."""

    stdin: int
    stdout: int
    stderr: int
    report: int
    """What the last process of the program says of itself."""


@dataclass
class Watched:
    """What was seen."""

    status: int = 0
    """Of the process that was waited for, as wait() gives it."""
    exceeded: str = ""
    """timeout, memory, output: the limit it was ended for."""
    out_of_cpu: bool = False
    """A process of the program was ended for the processor time it took."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    written: dict[str, bytearray] = field(
        default_factory=lambda: {"stdout": bytearray(), "stderr": bytearray(), "report": bytearray()}
    )


def watch(
    process: int, worker: int, streams: Streams, stdin: bytes, limits: dict[str, Any], control: int, alone: bool
) -> Watched:
    """Until `process` has ended or taken too much; then all of the program is ended.

    `worker`: the process with the code, where `process` is that of its tests. `control`: the pipe from the host, whose
    end ends us. `alone`: we are the first process of a namespace, so that every other one in it is the program's.
    """
    seen, began = Watched(), time.monotonic()
    names = {streams.stdout: "stdout", streams.stderr: "stderr", streams.report: "report"}
    for descriptor in (streams.stdin, *names):
        os.set_blocking(descriptor, False)
    poller = select.poll()
    for descriptor in names:
        poller.register(descriptor, select.POLLIN)
    poller.register(control, 0)  # POLLHUP only
    left = memoryview(stdin)
    if left:
        poller.register(streams.stdin, select.POLLOUT)
    else:
        os.close(streams.stdin)
    handle = os.pidfd_open(process)
    poller.register(handle, select.POLLIN)
    ours, looked = _resident_bytes(os.getpid()), began
    running = True
    while running:
        now = time.monotonic()
        if now - began > limits["wall_s"]:
            seen.exceeded = "timeout"
        elif now - looked > LOOK_S:
            looked = now
            if _taken_bytes(ours, alone, process) > limits["memory_bytes"]:
                seen.exceeded = "memory"
        if seen.exceeded:
            break
        for descriptor, event in poller.poll(1000 * LOOK_S):
            if descriptor == control:
                os._exit(1)  # the host has gone, and with us goes all that is in the namespace
            if descriptor == handle:
                running = False
            elif descriptor == streams.stdin:
                left = _feed(poller, descriptor, left, event)
            elif not _drain(descriptor, names[descriptor], seen, limits["output_bytes"]):
                poller.unregister(descriptor)
                del names[descriptor]
        if _written(seen) > limits["output_bytes"]:
            seen.exceeded = "output"
            break
    _end((worker, process), alone)
    for each in dict.fromkeys((worker, process)):
        _, seen.status, usage = os.wait4(each, 0)
        cpu_s = usage.ru_utime + usage.ru_stime
        ending = os.waitstatus_to_exitcode(seen.status)
        late = ending == -signal.SIGKILL and cpu_s >= limits["cpu_s"]
        seen.out_of_cpu = seen.out_of_cpu or ending == -signal.SIGXCPU or late
        seen.cpu_s += cpu_s
    seen.wall_s = time.monotonic() - began
    _reap(alone)
    for descriptor, name in names.items():
        while _drain(descriptor, name, seen, limits["output_bytes"]) and select.select([descriptor], [], [], 0)[0]:
            pass
    if not seen.exceeded and _written(seen) > limits["output_bytes"]:
        seen.exceeded = "output"
    os.close(handle)
    return seen


def _feed(poller: select.poll, descriptor: int, left: memoryview, event: int) -> memoryview:
    if event & (select.POLLERR | select.POLLHUP):
        left = left[:0]  # it does not read
    else:
        left = left[os.write(descriptor, left[:CHUNK]) :]
    if not left:
        poller.unregister(descriptor)
        os.close(descriptor)
    return left


def _drain(descriptor: int, name: str, seen: Watched, most: int) -> bool:
    """Read what there is, once. False at the end of the pipe, and where there is more than will be kept."""
    try:
        part = os.read(descriptor, CHUNK)
    except BlockingIOError:
        return False
    seen.written[name] += part[: max(0, most + 1 - _written(seen))] if name != "report" else part[:CHUNK]
    return bool(part) and _written(seen) <= most and len(seen.written["report"]) <= CHUNK


def _written(seen: Watched) -> int:
    return len(seen.written["stdout"]) + len(seen.written["stderr"])


def _taken_bytes(ours: int, alone: bool, process: int) -> int:
    """Memory of the program: what its processes have more than we, from whom they were forked, and its files."""
    total = 0
    if alone:
        files = os.statvfs("/scratch")
        total = (files.f_blocks - files.f_bfree) * files.f_frsize
    processes = [int(name) for name in os.listdir("/proc") if name.isdigit()] if alone else [process]
    for each in processes:
        if each != os.getpid():
            total += max(0, _resident_bytes(each) - ours)
    return total


def _resident_bytes(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm") as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    except OSError:
        return 0  # it has ended


def _end(processes: tuple[int, ...], alone: bool) -> None:
    """End all of the program. Only the first process of a namespace may signal "all": elsewhere that is the machine."""
    if alone and os.getpid() == 1:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return
    for process in processes:
        try:
            os.killpg(process, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _reap(alone: bool) -> None:
    """Wait for what has just been killed, so that the next run starts with nothing beside it."""
    while True:
        try:
            found, _ = os.waitpid(-1, 0 if alone else os.WNOHANG)
        except ChildProcessError:
            return
        if not found:
            return
