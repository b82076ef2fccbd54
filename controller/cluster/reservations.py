"""Slots that pools have reserved: Ray's placement groups.

pool of one process group      one placement group over all its slots, or one bundle on each of its nodes
pool of teams                  a placement group for each team, which is given back when the team goes
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group

from controller.cluster.pool import NoRoom
from rlhf_dist.config import PoolConfig

Place = tuple[Any, int]
"""Of a process: its placement group, and the bundle in it."""


class Reservations:
    """Of the pools of one cluster."""

    def __init__(self, wait_s: float) -> None:
        """wait_s: `ray.ready_timeout_s`, longest wait for slots to become free."""
        self._wait_s = wait_s
        self._groups: dict[str, list[Any]] = {}

    def take(
        self,
        name: str,
        pool: PoolConfig,
        team: int,
        ranks: Sequence[int],
        each: Mapping[str, float],
        wait_s: float | None = None,
    ) -> dict[int, Place]:
        """Reserve slots for these ranks of a pool, each with the resources `each`. wait_s: for them to become free,
        where that is not the reservations'. Raises NoRoom, and reserves none then."""
        if not ranks:
            return {}
        wait_s = self._wait_s if wait_s is None else wait_s
        if pool.nodes:
            whole = {what: amount * pool.slots for what, amount in each.items()}
            (group,) = self._reserve(name, [[whole] * pool.nodes], wait_s, "STRICT_SPREAD")
            return {rank: (group, rank // pool.slots) for rank in ranks}
        size = team or len(ranks)
        groups = self._reserve(name, [[dict(each)] * size] * (len(ranks) // size), wait_s)
        return {rank: (groups[at // size], at % size) for at, rank in enumerate(ranks)}

    def release(self, name: str, kept: Collection[Any] = ()) -> None:
        """Give back what a pool has, but for the placement groups `kept`; whatever runs in them ends."""
        groups = self._groups.get(name, [])
        for group in [group for group in groups if group not in kept]:
            groups.remove(group)
            with contextlib.suppress(Exception):
                remove_placement_group(group)
        if not groups:
            self._groups.pop(name, None)

    def release_all(self) -> None:
        """Give back what all pools have."""
        for name in list(self._groups):
            self.release(name)

    def rename(self, before: str, after: str) -> None:
        """What one pool has is another's."""
        self._groups[after] = self._groups.pop(before)

    def forget(self) -> None:
        """Ray has ended, and all reservations with it."""
        self._groups.clear()

    def _reserve(
        self, name: str, wanted: Sequence[list[dict[str, float]]], wait_s: float, strategy: str = "PACK"
    ) -> list[Any]:
        """A placement group for each of these lists of bundles."""
        names = f"rlhf-dist-{name}-{os.getpid()}-{time.time_ns()}"
        groups = [placement_group(one, strategy=strategy, name=f"{names}-{k}") for k, one in enumerate(wanted)]
        before = list(self._groups.get(name, ()))
        self._groups[name] = before + groups
        deadline = time.monotonic() + wait_s
        if not all(group.wait(timeout_seconds=max(0.1, deadline - time.monotonic())) for group in groups):
            free = _free_resources()
            self.release(name, before)
            spread = strategy == "STRICT_SPREAD"
            raise NoRoom(
                f"pool {name!r} needs {sum(map(len, wanted))} {'nodes with' if spread else 'slots of'} "
                f"{_resources(wanted[0][0])}, not free within {wait_s:g} s; the nodes have free: {free}. "
                f"Use fewer slots, add nodes, or end the job that holds them"
            )
        return groups


def _resources(bundle: Mapping[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in bundle.items())


def _free_resources() -> str:
    import ray
    from ray._private.state import available_resources_per_node

    lines = []
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    for node, free in available_resources_per_node().items():
        lines.append(f"{names.get(node, node)}: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU")
    return "; ".join(lines) or "no node is alive"
