"""Ranks for the checks that need some: a pool of the same processes, started the same way, as a run's.

What is tried on them is a role's worker whose construction tries it (workers/doctor): it raises, or its remark is what
was found. A pool in which something failed or hung is ended, and the next check gets a new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray

from controller.cluster.pool import ClusterError, Pool
from controller.cluster.start import Cluster
from rlhf_dist.config import PoolConfig
from rlhf_dist.failure import Failure, failure_of_call

READY_S = 30.0
"""For free slots; somebody else's job may hold them."""
CALL_S = 40.0
"""Until a collective of the ranks' group raises by itself."""


class NoRanks(RuntimeError):
    """No pool can be started now; the message says why."""


class RankPool:
    """One rank a GPU on every node that has free ones; without GPUs a rank a node, two on a single node."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._pool: Pool | None = None
        self._layout: PoolConfig | None = None
        self._count = 0
        self._broken = ""
        """Why no other pool is started."""

    def start(self) -> Pool:
        """The pool. Raises NoRanks where nothing is free, or an earlier start failed."""
        if self._broken:
            raise NoRanks(f"no ranks: {self._broken}")
        if self._pool is None:
            if self._layout is None:
                self._layout = layout_of(list(_free_by_node().values()), ray.cluster_resources().get("GPU", 0) > 0)
            self._count += 1
            name = self._name
            try:
                self._pool = self._cluster.add_pool(name, self._layout)
            except ClusterError as error:
                self._broken = self._broken or str(error)
                self._cluster.end_pool(name)
                raise
        return self._pool

    def attempt(self, name: str, worker: str, **settings: Any) -> str:
        """What rank 0 says of `worker` (package.module:Class), tried on all ranks. Raises RuntimeError for the first
        rank that failed; the others are not waited for."""
        pool = self.start()
        context = {"seed": 0, "nodes": pool.nodes, "sync_timeout_s": CALL_S}
        rank_of = {
            process.host_role.remote(name, worker, settings, context): rank
            for rank, process in enumerate(pool.processes)
        }
        found, left = "", list(rank_of)
        while left:
            ready, left = ray.wait(left, num_returns=1)
            answer = _answer(ready[0])
            if isinstance(answer, Failure):
                self.end(pool)
                raise RuntimeError(f"rank {rank_of[ready[0]]}: {answer.text}")
            if rank_of[ready[0]] == 0:
                found = "; ".join(answer)
        return found

    def end(self, pool: Pool | None = None) -> None:
        """End the processes, whatever they are at; the next check gets new ones. pool: only if it is still that one."""
        if pool is not None and pool is not self._pool:
            return
        self._pool = None
        self._cluster.end_pool(self._name)

    def close(self) -> None:
        """No more pools: a check that was given up may still be under way in its thread."""
        self._broken = "the doctor is done"

    @property
    def _name(self) -> str:
        return f"doctor-{self._count}"


def layout_of(free: Sequence[Mapping[str, float]], on_gpus: bool) -> PoolConfig:
    """The pool for nodes with these free resources. Raises NoRanks where none has any."""
    what = "GPU" if on_gpus else "CPU"
    slots = [int(min(node.get("CPU", 0), node.get(what, 0))) for node in free]
    usable = [count for count in slots if count >= 1]
    if not usable:
        raise NoRanks(f"no node has a free {what} (and a CPU beside it); another job holds them, or Ray counts none")
    if len(usable) == 1:
        return PoolConfig(slots=usable[0] if on_gpus else min(usable[0], 2))
    return PoolConfig(slots=min(usable) if on_gpus else 1, nodes=len(usable))


def _free_by_node() -> Mapping[str, Mapping[str, float]]:
    from ray._private.state import available_resources_per_node

    found: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    return found


def _answer(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        return failure_of_call(error)
