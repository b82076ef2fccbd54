"""An exception in a worker as plain text for the controller, the user's own lines of it, and the rest in the log.

    op raises ──> whole traceback ──> stderr, which is the worker's log file
              └─> Failure(kind, text, frames of the user's files) ──> the controller: try again, or say it

Exceptions themselves never travel: a user's class may not unpickle, and its text must be read all the same.
"""

from __future__ import annotations

import functools
import linecache
import re
import site
import sys
import sysconfig
import time
import traceback
from bdb import BdbQuit
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import rlhf_dist
from rlhf_dist.failure import Failure, FailureKind, Frame, text_of
from rlhf_dist.wire import Call
from workers.heartbeat import Activity

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Reporting")


class Reporting(Protocol):
    """A worker process, as far as its failures go."""

    activity: Activity
    is_actor: bool


OF_PEERS = ("SyncStopped", "DistBackendError", "DistNetworkError", "DistStoreError", "DistError")
"""Exceptions of weight syncs and of torch.distributed."""
OF_PEERS_TEXT = r"gloo/|NCCL (error|operation)|Connection (closed|reset) by peer|Timed out waiting \d+ms"
"""What a collective's RuntimeError says that has lost a peer."""
OURS = tuple(f"{Path(rlhf_dist.__file__).parents[1] / name}/" for name in ("rlhf_dist", "workers", "controller"))
LIBRARIES = tuple(
    f"{Path(folder)}/"
    for folder in {
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
    }
)


def reported(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R | Failure]:
    """A method of a worker process that returns a Failure for whatever is raised in it.

    SystemExit too: a library or a reward that calls `sys.exit` does not end the worker without a word. So does a
    KeyboardInterrupt in an actor, where no terminal sends one; in a local run it is the user's.

    The method is noted as what the process is at (heartbeat.py).
    """

    @functools.wraps(method)
    def attempt(self: S, *args: P.args, **kwargs: P.kwargs) -> R | Failure:
        try:
            with self.activity.noted(*_operation(method.__name__, args)):
                return method(self, *args, **kwargs)
        except BdbQuit:  # `q` at a breakpoint, in a local run
            raise
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 - it is the controller's message
            if isinstance(error, KeyboardInterrupt) and not self.is_actor:
                raise
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {method.__name__} failed", file=sys.stderr)
            traceback.print_exception(error)
            sys.stderr.flush()
            return failure_of(error)

    return cast(Callable[Concatenate[S, P], R | Failure], attempt)


def _operation(method: str, args: tuple[Any, ...]) -> tuple[str, int | None]:
    """A call of a process as people name it, and its step: `actor.update_actor`, 3; `host role actor`, None."""
    call = next((one for one in args if isinstance(one, Call)), None)
    if call is not None:
        return call.node, call.step
    return " ".join([method.replace("_", " "), *(one for one in args[:1] if isinstance(one, str))]), None


def failure_of(error: BaseException) -> Failure:
    """What the controller is told of `error`."""
    return Failure(
        lost=False,
        text=text_of(error),
        frames=_frames(error),
        kind=kind_of(error),
        of_peer=is_of_peer(error),
        at_s=time.time(),
    )


def is_of_peer(error: BaseException) -> bool:
    """Whether it says that another rank is gone, or does not come: that one's end may be the first cause."""
    if type(error).__name__ in OF_PEERS:
        return True
    return isinstance(error, RuntimeError) and re.search(OF_PEERS_TEXT, str(error)) is not None


KINDS = {
    **dict.fromkeys(("OutOfMemoryError", "MemoryError"), FailureKind.OUT_OF_MEMORY),
    # torch.distributed, and a Ray object whose owner died: RayError's own classes never leave `ray.get` otherwise.
    **dict.fromkeys(("DistError", "RayError", "ConnectionError"), FailureKind.INFRASTRUCTURE),
    **dict.fromkeys(("UnicodeError", "JSONDecodeError", "ArrowInvalid"), FailureKind.DATA),
}
"""Of libraries' exceptions, by the name of a class that they are or descend from: none of them need be imported."""
BY_TEXT = (
    # gloo raises plain RuntimeErrors that name its own file; the CPU allocator one that names itself.
    ("gloo/", FailureKind.INFRASTRUCTURE),
    ("Gloo connectFullMesh failed", FailureKind.INFRASTRUCTURE),
    ("NCCL error", FailureKind.INFRASTRUCTURE),
    ("DefaultCPUAllocator: can't allocate memory", FailureKind.OUT_OF_MEMORY),
)
"""Of libraries' exceptions that have no class of their own."""


def kind_of(error: BaseException) -> FailureKind:
    """The kind of the outermost exception that has one, of those it was raised from.

    A user's own line that fails on a connection or a text is code: what it talks to is not of this run.
    """
    at: BaseException | None = error
    seen: list[BaseException] = []
    while at is not None and at not in seen:
        if (kind := _own_kind(at)) is not None:
            users = any(is_users(frame.file) for frame in _frames(at))
            return FailureKind.CODE if users and kind in (FailureKind.INFRASTRUCTURE, FailureKind.DATA) else kind
        seen.append(at)
        at = at.__cause__
    return FailureKind.CODE


def _own_kind(error: BaseException) -> FailureKind | None:
    if (said := getattr(error, "failure_kind", None)) is not None:
        return FailureKind(said)
    by_name = next((KINDS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in KINDS), None)
    if by_name is not None or not isinstance(error, RuntimeError):
        return by_name
    return next((kind for part, kind in BY_TEXT if part in str(error)), None)


def _frames(error: BaseException) -> tuple[Frame, ...]:
    """Where in the user's files it was raised, outermost first: of the deepest cause that has such frames.

    For a library's error, or a bug of ours, without any: the innermost frame. None for an error that a `raise` of
    ours made: its text says what is wrong.
    """
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    for cause in reversed(chain):
        if users := tuple(frame for frame in _traceback(cause) if is_users(frame.file)):
            return users
    last = _traceback(error)[-1:]
    says = any(
        f.file.startswith(OURS) and linecache.getline(f.file, f.line).lstrip().startswith("raise ") for f in last
    )
    return () if says else last


def _traceback(error: BaseException) -> tuple[Frame, ...]:
    return tuple(
        Frame(file=frame.f_code.co_filename, line=line, function=frame.f_code.co_name)
        for frame, line in traceback.walk_tb(error.__traceback__)
    )


def is_users(file: str) -> bool:
    """Whether a file is neither ours, nor of Python, nor of an installed package. Recipes are the user's."""
    return not file.startswith(("<", *OURS, *LIBRARIES))


def refuse_breakpoint(*args: Any, **kwargs: Any) -> None:
    """What `breakpoint()` does in a worker, where nobody could answer its prompt."""
    raise RuntimeError(
        "breakpoint() needs a terminal, and a worker has none; it works anywhere with `rlhf-dist run ... --local`, "
        "and in the recipe with --eager"
    )
