"""Stacks of all processes of a run, for a person who asks while it goes on: `rlhf-dist stacks RUN`.

    command ── RUN/.stacks-ID.ask ──> a thread of the run, which looks for it every LOOK_S
                                        └─ beat(stacks) ──> every process, in a thread of its own there (docs/adr/116)
    command <── RUN/logs/stacks-ID.txt ─┘  those that do not answer within ANSWER_S are named

Files, since the command may be on any machine that has the run's folder; nothing of the run waits for it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from controller.cluster.pool import BEATS, ClusterError, Pool
from controller.cluster.replies import Replies
from rlhf_dist.failure import text_of
from rlhf_dist.heartbeat import Beat, stacks_of

LOOK_S = 1.0
ANSWER_S = 20.0
ASK, LOGS = ".stacks-*.ask", "logs"


def answered(asked: Mapping[Any, str], replies: Replies, limit_s: float) -> tuple[list[str], list[str]]:
    """Stacks of those that answer within `limit_s`, and the names of the others. asked: question -> who was asked."""
    deadline, told, silent, left = time.perf_counter() + limit_s, list[str](), list[str](), list(asked)
    while left:
        ready = replies.ready(left, max(0.0, deadline - time.perf_counter()))
        if not ready:
            break
        left = [ref for ref in left if ref not in ready]
        answers: list[Any] = list(replies.get(ready, limit_s))
        for ref, answer in zip(ready, answers, strict=True):
            if isinstance(answer, Beat):
                told.append(f"== {asked[ref]}, {_at(answer)}\n{answer.stacks}")
            else:  # what Ray raises for a process that is gone
                silent.append(asked[ref])
    return told, [*silent, *(asked[ref] for ref in left)]


@contextmanager
def stacks_on_demand(folder: Path, pools: Callable[[], Mapping[str, Pool]], replies: Replies) -> Iterator[None]:
    """Answer those who ask, while inside. folder: of the run. pools: those there are at that moment."""
    ended = threading.Event()

    def look() -> None:
        said = False
        while not ended.wait(LOOK_S):
            try:
                for asking in folder.glob(ASK):
                    asking.unlink(missing_ok=True)
                    _write(folder / LOGS / f"{asking.stem[1:]}.txt", _all_stacks(dict(pools()), replies))
            except OSError:  # the disk is full or gone: who asks is told that nobody answers
                pass
            except Exception:  # the next who asks may have an answer
                if not said:
                    traceback.print_exc()
                said = True

    for old in folder.glob(ASK):  # of who asked an earlier run
        old.unlink(missing_ok=True)
    thread = threading.Thread(target=look, name="stacks on demand", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LOOK_S)


def ask_for_stacks(folder: Path, limit_s: float) -> Path:
    """The file with the stacks of a run that goes on. Raises ClusterError where it does not answer."""
    name = f"stacks-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    asking, answer = folder / f".{name}.ask", folder / LOGS / f"{name}.txt"
    asking.touch()
    deadline = time.monotonic() + limit_s
    try:
        while time.monotonic() < deadline:
            if answer.is_file():
                return answer
            time.sleep(0.1)
    finally:
        asking.unlink(missing_ok=True)
    raise ClusterError(
        f"the run of {folder} has not answered within {limit_s:g} s; it may be starting or ending, or is stopped itself"
    )


def _all_stacks(pools: Mapping[str, Pool], replies: Replies) -> str:
    own = threading.get_ident()
    here = {thread: frame for thread, frame in sys._current_frames().items() if thread != own}
    parts = [f"== the run itself, process {os.getpid()}\n{stacks_of(here)}"]
    try:
        asked = {
            process.beat.options(concurrency_group=BEATS).remote((), True): f"{name} {rank}"
            for name, pool in pools.items()
            if pool.node_ids  # of a local run: this process
            for rank, process in enumerate(pool.processes)
        }
        told, silent = answered(asked, replies, ANSWER_S)
    except Exception as error:  # whatever Ray raises when it is gone
        return "\n".join([*parts, f"== the other processes could not be asked: {text_of(error)}\n"])
    if silent:
        parts.append(f"== no answer within {ANSWER_S:g} s: {', '.join(silent)}\n")
    return "\n".join([*parts, *sorted(told)])


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # a line may hold half a character
    partial.replace(file)


def _at(beat: Beat) -> str:
    return "; ".join(f"{one.op}: {one.place}, for {one.seconds:.0f} s" for one in beat.doing) or "idle"
