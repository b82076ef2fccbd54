"""A limit on how long a block of Python may run, by a signal: main thread only, and not inside one C call."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_S = 0.2


class OutOfTime(BaseException):
    """The block ran out of time. No `Exception`, so that `except Exception` inside the block lets it pass."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after `seconds`; RuntimeError outside the main thread of the process.

    The signal comes again every 0.2 s: an exception raised while Python runs a destructor or a garbage
    collection callback is swallowed there, and a limit that fires once would be lost with it.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a time limit must be set in the main thread of its process: it is a signal")

    def stop(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
