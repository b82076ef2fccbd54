"""A cluster whose processes outlive a run: a start of Ray actors that import an engine is half of a tiny run's time."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace

from controller.cluster.pool import Pool
from controller.cluster.start import Cluster
from rlhf_dist.config import PoolConfig, RayConfig
from rlhf_dist.placement.roles import HOST_POOL

RELEASE_S = 60.0
"""Longest wait for processes to free what a run left; longer: they are not kept."""

SLOTS = 14
"""Of pools at work and idle. Ray's others are for runs that start processes of their own; each process has 0.5 GB."""


class WarmCluster(Cluster):
    """Keeps its processes between runs, without roles: pools of the next run that have their size get them."""

    def __init__(self) -> None:
        super().__init__(RayConfig(), slots=12, host_processes=1)
        self.idle: list[Pool] = []
        self._count = itertools.count()
        self._slots: dict[object, str] = {}
        """First process of a pool -> the name its slots are kept under."""

    def __exit__(self, *error: object) -> None:
        for name, pool in list(self.pools.items()):
            freed = [process.release_roles.remote() for process in pool.processes]
            if any(answer is not None for answer in self.replies.get(freed, RELEASE_S)):  # why it could not
                self.end_pool(name)
                continue
            self.idle.append(self.pools.pop(name))
            self.watch.remove(name)

    def begin_pool(self, name: str, pool: PoolConfig, team: int, modules: Sequence[str]) -> None:
        self._modules[name] = modules  # which of its pools need new processes, `add_pool` finds out

    def add_pool(self, name: str, pool: PoolConfig, team: int = 0) -> Pool:
        found = self._again(name, pool.slots, False, team)
        if found is None:
            self._make_room(pool.slots * max(pool.nodes, 1))
            found = self._kept(super().add_pool(name, pool, team))
        return found

    def change_pool(self, name: str, pool: PoolConfig, dead: Collection[int]) -> Pool:
        self._make_room(max(0, pool.slots - self.pools[name].size))
        self._reserved.rename(self._slots.pop(self.pools[name].processes[0]), name)
        return self._kept(super().change_pool(name, pool, dead))

    def add_host_pool(self) -> Pool:
        found = self._again(HOST_POOL, self.host_processes, True)
        if found is None:
            self._make_room(self.host_processes)
            found = self._kept(super().add_host_pool())
        return found

    def end(self) -> None:
        """End all processes, at work or idle."""
        self.pools |= {str(k): pool for k, pool in enumerate(self.idle)}
        self.close()

    def _make_room(self, size: int) -> None:
        """End idle pools, those first that are idle for longest, until there are so many slots beside the others."""
        while self.idle and sum(one.size for one in (*self.pools.values(), *self.idle)) + size > SLOTS:
            oldest = self.idle.pop(0)
            name = f"no longer needed {next(self._count)}"
            self.pools[name] = replace(oldest, name=name)
            self.end_pool(name)

    def _kept(self, pool: Pool) -> Pool:
        """Its slots are given back in the end, whatever other pools of its name there are until then."""
        kept = self._slots[pool.processes[0]] = f"kept {next(self._count)}"
        self._reserved.rename(pool.name, kept)
        return pool

    def end_pool(self, name: str) -> None:
        if name in self.pools:
            self._reserved.rename(self._slots.pop(self.pools[name].processes[0]), name)
        super().end_pool(name)

    def _again(self, name: str, size: int, host: bool, team: int = 0) -> Pool | None:
        wanted = (size, host, team)
        found = next((one for one in self.idle if (one.size, one.name == HOST_POOL, one.team) == wanted), None)
        if found is not None:
            self.idle.remove(found)
            self.pools[name] = replace(found, name=name)
            self.watch.add(self.pools[name])  # under the name that this run knows it by
        return self.pools.get(name)
