"""An exception in a worker as plain text for the controller, the user's own lines of it, and the rest in the log.

    op raises ──> whole traceback ──> stderr, which is the worker's log file
              └─> Failure(text, frames of the user's files, log) ──> the controller's message

Exceptions themselves never travel: a user's class may not unpickle, and its text must be read all the same.
"""

from __future__ import annotations

import functools
import linecache
import site
import sys
import sysconfig
import time
import traceback
from bdb import BdbQuit
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import rlhf_dist
from rlhf_dist.failure import Failure, Frame, text_of

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")

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

    SystemExit too: a library or a reward that calls `sys.exit` does not end the worker without a word.
    """

    @functools.wraps(method)
    def attempt(self: S, *args: P.args, **kwargs: P.kwargs) -> R | Failure:
        try:
            return method(self, *args, **kwargs)
        except BdbQuit:  # `q` at a breakpoint, in a local run
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a worker's failure is the controller's message
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {method.__name__} failed", file=sys.stderr)
            traceback.print_exception(error)
            sys.stderr.flush()
            return failure_of(error)

    return cast(Callable[Concatenate[S, P], R | Failure], attempt)


def failure_of(error: BaseException) -> Failure:
    """What the controller is told of `error`."""
    return Failure(lost=False, text=text_of(error), frames=_frames(error))


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
