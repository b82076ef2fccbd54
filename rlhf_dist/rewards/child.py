"""The process that rewards are computed in: a main thread of its own, warm, told to score rows until it is closed.

    host                                         child
      function, settings   ------------------->  unpickle, import, make the instance  -> ready
      rows of a batch      ------------------->  call, call, call ...
      (finished calls, ...) <------------------  as they end, a few at a time
      started [calls]      <== shared memory ==  when each call under way began

What a function prints goes to a pipe that the host drains; what it forks dies with it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import pickle
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from rlhf_dist.rewards.calls import Calls, Finished, Rows
from rlhf_dist.rewards.signature import Signature

FLUSH_S = 0.05
"""Finished calls are sent together, at most this late."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a call may take."""

    timeout_s: float = 60.0
    """Seconds."""
    memory_bytes: int = 4 << 30
    """Of the process with all it started."""
    concurrency: int = 16
    """Calls of an `async def` function under way at one time."""
    environment: tuple[str, ...] = ()
    """Variables that its process gets besides the usual ones."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows to score."""

    rows: Rows
    num_rows: int
    concurrency: int
    stop: bool
    """Nothing more is called once a row has failed."""


@dataclass(frozen=True)
class Report:
    """Calls that ended since the last report."""

    finished: list[Finished]
    over: bool = False
    """The task is done."""


def main(requests: int, table: int) -> None:
    """Serve `requests` (a connection's file descriptor) until it closes. `table`: the file of `started`."""
    _follow_parent()
    faulthandler.enable()
    for descriptor in (requests, table):
        os.set_inheritable(descriptor, False)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what was printed before a hang is seen
    connection = Connection(requests)
    try:
        payload, signature, limits = connection.recv()
        _limit_memory(limits.memory_bytes)
        calls = _load(payload, signature, limits)
    except BaseException as error:
        traceback.print_exception(error)
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(None)
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            break
        started: Any = np.frombuffer(mmap.mmap(table, 8 * task.num_rows), np.float64)
        _serve(calls, task, started, connection)
    sys.stdout.flush()
    os._exit(0)  # threads that a function left behind are not waited for


def _load(payload: bytes, signature: Signature, limits: Limits) -> Calls:
    function = pickle.loads(payload)
    return Calls(function, signature, timeout_s=limits.timeout_s, concurrency=limits.concurrency, alone=True)


def _serve(calls: Calls, task: Task, started: Any, connection: Connection) -> None:
    ended: list[Finished] = []
    sent = time.monotonic()
    calls.concurrency = task.concurrency
    for finished in calls.run(task.rows, task.num_rows, started):
        ended.append(finished)
        failed = any(isinstance(outcome, str) for outcome in finished.outcomes)
        if finished.out_of_memory or (task.stop and failed):
            break  # What leaked is not given back: the host goes on with a new process.
        now = time.monotonic()
        if now - sent > FLUSH_S:
            connection.send(Report(ended))
            ended, sent = [], now
    sys.stdout.flush()
    connection.send(Report(ended, over=True))


def _limit_memory(count: int) -> None:
    """Allocations beyond `count` bytes fail: a MemoryError in the row that asks for them."""
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    count = count if most == resource.RLIM_INFINITY else min(count, most)
    resource.setrlimit(resource.RLIMIT_DATA, (count, count))


def _follow_parent() -> None:
    """End with the process that started this one, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
