"""What a worker process says of itself while its calls are under way, and what it sees of its neighbours."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType

from rlhf_dist.process_state import ProcessState


@dataclass(frozen=True, kw_only=True)
class Doing:
    """A call that a process is at."""

    op: str
    """`actor.update_actor`, `host_role actor`."""
    step: int | None
    """None where it belongs to none."""
    seconds: float
    """How long it has been at it."""
    place: str
    """Where its thread stands: `policy.py:31 in loss`, or the collective that it is in."""
    waits: bool
    """It waits there for other ranks."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """One answer of a process, given by a thread of its own: a process that hangs gives it, a stopped one does not."""

    doing: tuple[Doing, ...]
    """Longest first; none: it is idle."""
    seen: Mapping[int, ProcessState] = field(default_factory=dict)
    """Process id -> what it sees of that neighbour, of those that it was asked about and has seen alive."""
    stacks: str = ""
    """Of its Python threads, where that was asked for."""

    @property
    def main(self) -> Doing | None:
        """What it has been at the longest."""
        return self.doing[0] if self.doing else None


def stacks_of(frames: Mapping[int, FrameType]) -> str:
    """Threads of this process by name, and where each stands."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(thread, thread)}:\n{''.join(traceback.format_stack(frame))}"
        for thread, frame in frames.items()
    )
