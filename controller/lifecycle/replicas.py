"""What becomes of a dead replica of a pool that only generates: the run goes on without it until the next weight sync.

    lost      counted like any recovery; the others take its rows                     DEAD
    mend      its processes are started anew and meet those that train                REBUILDING, CATCHING_UP
    synced    the whole pool has verified the weights of that step: it serves again   HEALTHY      (domains.py)

The pool is at nothing between `mend` and `synced`: the sync that called for it comes next. Processes of replicas that
live are kept, with the rows they have made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from controller.cluster.pool import Pool
from controller.execution.failed_calls import WorkerLost
from controller.execution.worker_group import WorkerGroup
from controller.lifecycle.recovering import Recovery, shortened
from controller.lifecycle.session import Session, pools_of_roles
from controller.recovery.domains import Domains, Health
from rlhf_dist.placement.roles import pool_slots


@dataclass(frozen=True, kw_only=True)
class Replaced(Recovery):
    """A replica that died and serves again."""

    ranks: tuple[int, ...]
    rows: int
    """That others generated in its place."""

    def __str__(self) -> str:
        who = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))} of pool {self.pools[0]}"
        return (
            f"recovered in {self.seconds:.1f} s: {self.rows} prompts of {who} went to other replicas; a new one serves "
            f"with the weights of {self.back_to} steps, after: {self.what}"
        )


@dataclass
class _Lost:
    ranks: tuple[int, ...]
    rows: int
    what: str
    at_s: float
    at_step: int


class DeadReplicas:
    """Implements `controller.execution.replicas.Replicas`."""

    def __init__(
        self,
        session: Session,
        admit: Callable[[WorkerLost], int],
        phase: Callable[[str], None],
        done: Callable[[Recovery], None],
    ) -> None:
        """admit: returns the steps done where the run may go on, or raises what it is given. phase: hears what begins;
        done: of what came to its end."""
        self._session, self._admit, self._phase, self._done = session, admit, phase, done
        self._lost: dict[str, list[_Lost]] = {}
        self._domains: dict[str, Domains] = {}

    def covers(self, pool: Pool) -> bool:
        """Whether the pool has other replicas, and a sync comes in every step that gives new ones all the weights they
        need: of one role, which learns. Weights that are copied to a role may come many steps later (`every=`)."""
        launch = self._session.launch
        roles = [role for role, name in pools_of_roles(launch).items() if name == pool.name]
        synced = len(roles) == 1 and "." in roles[0] and launch.dataflow.facts[roles[0].split(".")[0]].trained
        return 0 < pool.team < pool.size and synced and launch.run.recovery.retries > 0

    def dead(self, pool: str) -> Collection[int]:
        """See Replicas."""
        return {rank for one in self._lost.get(pool, ()) for rank in one.ranks}

    def lost(self, pool: Pool, ranks: Sequence[int], rows: int, error: WorkerLost) -> None:
        """See Replicas."""
        at_step, what = self._admit(error), shortened(str(error))
        domains = self._domains.setdefault(pool.name, Domains((), silent_s=0.0, clock=time.monotonic))
        name = _name(ranks)
        domains.add(name)
        domains.died(name)
        self._lost.setdefault(pool.name, []).append(_Lost(tuple(ranks), rows, what, time.perf_counter(), at_step))
        who = f"rank {', '.join(map(str, ranks))} of pool {pool.name} is gone"
        self._phase(f"recovery: {who}, its {rows} prompts go to the other replicas")

    def mend(self, pool: str) -> Mapping[str, WorkerGroup]:
        """See Replicas. Raises ClusterError where the new processes do not come up."""
        dead, domains, session = sorted(self.dead(pool)), self._domains[pool], self._session
        self._phase(f"recovery: replacing rank {', '.join(map(str, dead))} of pool {pool}")
        incarnations = {name: domains.rebuild(name) for name in domains.those(Health.DEAD)}
        session.change_pool(pool, pool_slots(session.launch.run.placement, pool), dead, self._phase)
        for name, incarnation in incarnations.items():
            domains.up(name, incarnation)
        return session.groups

    def synced(self, pool: str, steps_done: int) -> None:
        """See Replicas."""
        domains = self._domains.get(pool)
        if domains is None or not domains.those(Health.CATCHING_UP):
            return
        domains.goal(steps_done)
        for name in domains.those(Health.CATCHING_UP):
            domains.verified(name, domains.incarnation(name), steps_done)
        for one in self._lost.pop(pool):
            seconds = time.perf_counter() - one.at_s
            self._done(
                Replaced(
                    what=one.what,
                    pools=(pool,),
                    failed_at=one.at_step,
                    back_to=steps_done,
                    source="replicas",
                    seconds=seconds,
                    ranks=one.ranks,
                    rows=one.rows,
                )
            )


def _name(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
