"""Copies of what every rank has learned, in the memory of other nodes: newer than a checkpoint, gone with the run.

    barrier    rank r of node i  --- its parts, by shared memory or the network --->  keeper of node i + 1
    recovery   rank r, old or new  <--------------------------------------------------  the same keeper

A copy counts once every rank of every role that learns has its part at a keeper; the one before it is let go of then.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from controller.cluster.failure_text import explained
from controller.cluster.pool import ClusterError
from controller.lifecycle.session import Session
from controller.lifecycle.step_end import StepEnd
from rlhf_dist.failure import Failure, failure_of_call
from rlhf_dist.placement.roles import HOST_POOL

LOOK_S = 30.0
"""Longest wait for a keeper's word."""


@dataclass(frozen=True, kw_only=True)
class _Copy:
    end: StepEnd
    keepers: dict[tuple[str, int], Any]
    """(role, rank) -> who has its part."""


class MemoryCopies:
    """The newest copy of one run, and how it is made and taken back."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._newest: _Copy | None = None

    def make(self, end: StepEnd) -> dict[str, float]:
        """Copy what all ranks hold, nothing being under way; what that cost. Raises ClusterError, the copy before it
        being there still."""
        started, session = time.perf_counter(), self._session
        keepers: dict[tuple[str, int], Any] = {}
        asked: dict[Any, tuple[str, int]] = {}
        limit_s = session.launch.run.ray.call_timeout_s
        for role in session.model_roles:
            pool = session.groups[role].pool
            for rank, process in enumerate(pool.processes):
                keeper = keepers[role, rank] = session.cluster.keeper(pool.node_ids[rank])
                asked[process.copy_state.remote(role, end.done, keeper, limit_s)] = (role, rank)
        try:
            told = self._answers(asked, "copy its state", limit_s)
        except ClusterError:
            if self.newest(()) is None:  # A keeper is gone, with its node: others are started for the next copy.
                session.cluster.end_keepers()
            raise
        self._newest = _Copy(end=end, keepers=keepers)
        session.cluster.replies.get([k.forget_but.remote(end.done) for k in self._each(keepers)], LOOK_S)
        return {"memory_copy_s": time.perf_counter() - started, "memory_copy_bytes": float(sum(told))}

    def newest(self, dead: Collection[str]) -> StepEnd | None:
        """Where the newest copy goes back to, if all of it is there. dead: pools that are to be rebuilt."""
        if self._newest is None:
            return None
        end, keepers = self._newest.end, self._newest.keepers
        if HOST_POOL in dead and end.has_references:
            return None
        answers = self._session.cluster.replies.get([k.has.remote(end.done) for k in self._each(keepers)], LOOK_S)
        there = {part for answer in answers if isinstance(answer, set) for part in answer}
        return end if keepers.keys() <= there else None

    def put_back(self) -> None:
        """Have every rank go on from its part. Raises ClusterError."""
        assert self._newest is not None, "newest() said that there is one"
        session, limit_s = self._session, self._session.launch.run.ray.call_timeout_s
        asked = {
            session.groups[role].pool.processes[rank].put_back.remote(role, self._newest.end.done, keeper, limit_s): (
                role,
                rank,
            )
            for (role, rank), keeper in self._newest.keepers.items()
        }
        self._answers(asked, "take its state back", limit_s)

    def _answers(self, asked: dict[Any, tuple[str, int]], what: str, limit_s: float) -> list[Any]:
        replies, left, told = self._session.cluster.replies, list(asked), []
        deadline = time.monotonic() + limit_s
        while left:
            if time.monotonic() > deadline:
                role, rank = asked[left[0]]
                raise ClusterError(f"{role}, rank {rank}, did not {what} within ray.call_timeout_s={limit_s:g} s")
            ready = replies.ready(left, 1.0)
            left = [ref for ref in left if ref not in ready]
            for ref, answer in zip(ready, replies.get(ready, LOOK_S), strict=True):
                failure: Any = failure_of_call(answer) if isinstance(answer, Exception) else answer
                if isinstance(failure, Failure):
                    role, rank = asked[ref]
                    text = f"{role}, rank {rank}, could not {what}: {explained(failure, None)}"
                    raise ClusterError(text).of(failure.kind)
                told.append(answer)
        return told

    @staticmethod
    def _each(keepers: dict[tuple[str, int], Any]) -> list[Any]:
        return list(dict.fromkeys(keepers.values()))
