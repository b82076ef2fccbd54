"""Replicas of a pool that only generates: when one dies, the others generate what it has not answered.

    a call to it is lost ── may the run go on? (Replicas.lost) ──> its rows, cut again, go to those that live
    more generation in that step                               ──> the rows of its part go to them at once
    anything else for the pool, that is a weight sync          ──> new processes first (Replicas.mend)
    that sync has been verified                                ──> it serves again (Replicas.synced)

What is drawn depends on seed, step, node, row and copy only: it is the same, wherever it is drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from controller.cluster.pool import Pool
from controller.execution.failed_calls import WorkerLost
from controller.execution.worker_group import Shards, WorkerGroup
from rlhf_dist.batch import IntArray
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.dispatch import balance


class Replicas(Protocol):
    """Who decides what becomes of a dead replica, and starts another (`controller/lifecycle/replicas.py`)."""

    def covers(self, pool: Pool) -> bool:
        """Whether replicas of this pool may take over from each other."""
        ...

    def dead(self, pool: str) -> Collection[int]:
        """Ranks of dead replicas."""
        ...

    def lost(self, pool: Pool, ranks: Sequence[int], rows: int, error: WorkerLost) -> None:
        """These ranks are dead, and `rows` rows go to others. Raises `error` where the run must not go on like that."""
        ...

    def mend(self, pool: str) -> Mapping[str, WorkerGroup]:
        """Start new processes for the dead ones of a pool that is at nothing; the groups of its roles from now on."""
        ...

    def synced(self, pool: str, steps_done: int) -> None:
        """All of the pool has verified the weights after so many steps."""
        ...


@dataclass(frozen=True)
class Takeover:
    """Rows of a dead replica that a living one takes."""

    calls: tuple[int, ...]
    """Of its node: one for each rank of the replica."""
    ranks: tuple[int, ...]
    """That are called."""
    part: int
    """Of the node's shards."""


def lost_team(replicas: Replicas, node: Node, error: WorkerLost, pools: Collection[Pool]) -> tuple[Pool, range] | None:
    """The pool and the ranks of the replica that this error is about; None where others cannot take over. pools: those
    that `node` was called on."""
    cause = error.cause
    if node.rows != "expand" or cause is None or cause.fatal:
        return None
    pool = next((pool for pool in pools if pool.name == cause.pool), None)
    if pool is None or not replicas.covers(pool):
        return None
    first = cause.rank - cause.rank % pool.team
    team = range(first, first + pool.team)
    left = set(range(pool.size)) - set(replicas.dead(pool.name)) - set(team)
    return (pool, team) if left else None


def living(pool: Pool, dead: Collection[int]) -> list[tuple[int, ...]]:
    """Ranks of each replica that lives."""
    teams = (tuple(range(first, first + pool.team)) for first in range(0, pool.size, pool.team))
    return [team for team in teams if not set(team) & set(dead)]


def hand_over(
    shards: Shards,
    part_of_call: Sequence[int],
    lost: Collection[int],
    teams: Sequence[tuple[int, ...]],
    tokens: IntArray,
) -> tuple[Shards, list[Takeover]]:
    """Cut the parts of `lost` calls again, for `teams` to take a share each: the shards then, and who takes what.

    part_of_call: of all calls of the node so far; new ones are numbered behind them, and shares of a part that is
    nobody's yet behind the parts. tokens: [B]. The calls and the answer of a dead replica are taken by one of the
    living, so that every call has a reply in the end.
    """
    parts, answering, part_of_answer = list(shards.parts), list(shards.answering), list(shards.part_of_answer)
    takeovers: list[Takeover] = []
    count = len(part_of_call)
    for turn, part in enumerate(dict.fromkeys(part_of_call[call] for call in sorted(lost))):
        rows = parts[part]
        cuts = balance(tokens[rows], min(len(teams), max(1, len(rows))))
        calls = tuple(call for call, of in enumerate(part_of_call) if of == part)
        place = next(calls.index(call) for call in answering if call in calls)
        for k, cut in enumerate(cuts):
            team = teams[(turn + k) % len(teams)]
            if k == 0:
                parts[part] = rows[cut]
                takeovers.append(Takeover(calls, team, part))
                continue
            new = tuple(range(count, count + len(team)))
            count += len(team)
            parts.append(rows[cut])
            answering.append(new[place])
            part_of_answer.append(len(parts) - 1)
            takeovers.append(Takeover(new, team, len(parts) - 1))
    return replace(
        shards, parts=tuple(parts), answering=tuple(answering), part_of_answer=tuple(part_of_answer)
    ), takeovers
