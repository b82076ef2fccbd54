"""Who is to blame when calls do not come back: a pure decision over what processes say and what their neighbours see.

    process   answers            busy, or it waits for the others of its call: nothing to blame
              is silent, and a neighbour or the kernel sees it
                        ended            died: the earliest one, or its node where Ray's raylet there went first
                        stopped          stopped (SIGSTOP), after STOPPED_S
                        alive            busy (a library holds the interpreter's lock): the call's limit decides
              is silent, and nobody there answers
                        all of its node  the node is cut off or gone, after SILENT_S
                        else             the process does not answer, after SILENT_S

A process that only waits for another one is never blamed: it answers, from a thread of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_dist.heartbeat import Beat
from rlhf_dist.process_state import ProcessState

STOPPED_S = 8.0
"""A process may be stopped for so long: somebody looks at it, or the machine is suspended."""
SILENT_S = 25.0
"""Without an answer for so long, with nobody to look, a process is lost."""
MOST_NAMED = 6
"""Processes that a message lists."""

Kind = Literal["died", "stopped", "silent", "node", "head"]


@dataclass(frozen=True, kw_only=True)
class FirstCause:
    """What is lost to the run, the first cause of whatever failed since."""

    kind: Kind
    how: str
    """`was killed by signal 9 (SIGKILL)`."""
    node: str
    """Address of the node it was on, or of Ray's head."""
    pool: str = ""
    """Of the process; empty where a whole node or Ray's head is lost."""
    rank: int = 0
    pid: int = 0
    fatal: bool = False
    """The controller cannot go on without it: Ray's head, or the raylet of its own node."""
    waiting: tuple[str, ...] = ()
    """Who waits for it: `main 0 in all_gather`."""

    @property
    def text(self) -> str:
        """One line: what is lost, why, who waits."""
        if self.kind in ("node", "head"):
            what = self.how
        else:
            what = f"its process (pool {self.pool}, rank {self.rank}, pid {self.pid} on node {self.node}) {self.how}"
        more = len(self.waiting) - MOST_NAMED
        said = ", ".join(self.waiting[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
        return what + (f"; waiting for it: {said}" if said else "")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known of a process that is waited for."""

    pool: str
    rank: int
    pid: int
    node: str
    """Address."""
    silent_s: float
    """Since the first question that it has left unanswered; 0: it has answered all."""
    stopped_s: float = 0.0
    """Since it was first seen stopped, without a break."""
    beat: Beat | None = None
    """Its last one."""
    state: ProcessState | None = None
    """What a neighbour, or the controller on its own machine, sees of it; None: nobody could look."""

    @property
    def name(self) -> str:
        """For a list of those who wait."""
        doing = self.beat.main if self.beat else None
        if doing is None:
            return f"{self.pool} {self.rank}"
        return f"{self.pool} {self.rank} {'in' if doing.waits else 'at'} {doing.place or doing.op}"


def decide(
    seen: Sequence[Seen], raylets: Mapping[str, ProcessState], *, stopped_s: float = STOPPED_S
) -> FirstCause | None:
    """The first cause among the processes of some calls; None: nothing to blame (yet).

    raylets: node -> how Ray's process there stands; of the controller's own node, if any.
    """
    waiting = tuple(
        one.name for one in seen if one.beat and not one.silent_s and (one.state is None or one.state.alive)
    )
    dead = [one for one in seen if one.state is not None and not one.state.alive]
    for node, state in raylets.items():
        if not state.alive and all(state.ended_at <= _ended(one) for one in dead):
            how = f"Ray's raylet on node {node} {state.text}"
            return FirstCause(kind="node", node=node, how=how, fatal=True, waiting=waiting)
    if dead:
        first = min(dead, key=_ended)
        return _of(first, "died", first.state.text if first.state else "", waiting)
    for one in seen:
        if one.state is not None and one.state.stopped and one.stopped_s >= stopped_s:
            return _of(one, "stopped", one.state.text, waiting)
    lost = [one for one in seen if one.state is None and one.silent_s >= SILENT_S]
    for first in lost[:1]:
        there = [one for one in seen if one.node == first.node]
        others = [one for one in seen if one.node != first.node]
        if others and all(one in lost for one in there):
            count = f"its {len(there)} processes" if len(there) > 1 else "its process"
            names = ", ".join(f"{one.pool} {one.rank}" for one in there[:MOST_NAMED])
            said = f"node {first.node} does not answer: it is gone or its network is cut ({count}: {names})"
            return FirstCause(kind="node", node=first.node, how=said, waiting=waiting)
        return _of(first, "silent", f"has not answered for {first.silent_s:.0f} s", waiting)
    return None


def _ended(one: Seen) -> float:
    return one.state.ended_at if one.state is not None else 0.0


def _of(one: Seen, kind: Kind, how: str, waiting: tuple[str, ...]) -> FirstCause:
    return FirstCause(kind=kind, how=how, node=one.node, pool=one.pool, rank=one.rank, pid=one.pid, waiting=waiting)
