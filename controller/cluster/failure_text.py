"""A worker's failure as one line: what was raised, the user's own lines, and the file with the whole traceback.

KeyError: 'nope'; at mine.py:23 in centred: rewards = batch["nope"]; whole traceback in runs/mine/logs/host-0.log
"""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from pathlib import Path

from rlhf_dist.failure import Failure, Frame

MOST_FRAMES = 4
"""Of the user's frames, the innermost."""


def explained(failure: Failure, log: str | None) -> str:
    """The text, where in the user's files it comes from, and the log (None: there is none)."""
    frames = [_place(frame) for frame in reversed(failure.frames[-MOST_FRAMES:])]
    parts = [failure.text]
    if frames:
        parts.append(f"at {', called from '.join(frames)}")
    if log:
        parts.append(f"{'see its log' if failure.lost else 'whole traceback in'} {shown(log)}")
    return "; ".join(parts)


def logs_of(logs: Sequence[str]) -> str:
    """Where to look, for a failure of several ranks."""
    return f"; see {', '.join(map(shown, logs[:4]))}{', ...' if len(logs) > 4 else ''}" if logs else ""


def shown(file: str | Path) -> str:
    """A path as a person in this folder would type it."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _place(frame: Frame) -> str:
    # Read here: the user's file may not exist on the worker's machine, its code travelled by value.
    source = linecache.getline(frame.file, frame.line).strip()
    return f"{shown(frame.file)}:{frame.line} in {frame.function}" + (f": {source}" if source else "")
