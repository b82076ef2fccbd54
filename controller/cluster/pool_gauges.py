"""What GPUs of pools were at, by rank, as metrics of the step after: `gpu/POOL-RANK/busy_percent`.

Asked for when a step ends and told when the next one does, so that nobody waits: a rank that does not answer is missing
then, and is asked again once it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controller.cluster.pool import BEATS, Pool
from controller.cluster.replies import Replies

EACH = 64
"""Ranks of a pool up to which every one has metrics of its own; of more, mean, least and most are told."""


class PoolGauges:
    """Of one run."""

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self._asked: dict[tuple[str, int, int], Any] = {}
        """(pool, rank, its process id) -> reference to its answer."""

    def metrics(self, pools: Mapping[str, Pool]) -> dict[str, float]:
        """Of the ranks that have answered since this was last called."""
        there = {
            (pool.name, rank, pid): pool.processes[rank]
            for pool in pools.values()
            for rank, (pid, device) in enumerate(zip(pool.pids, pool.devices, strict=False))
            if device.startswith("cuda")
        }
        self._asked = {key: ref for key, ref in self._asked.items() if key in there}
        told = self._answers()
        for key in there.keys() - self._asked.keys():
            self._asked[key] = there[key].gauges.options(concurrency_group=BEATS).remote()
        return {f"gpu/{name}": value for name, value in _named(told).items()}

    def _answers(self) -> dict[tuple[str, int], dict[str, float]]:
        """(pool, rank) -> gauges, of those that are there; they are no longer asked."""
        if not self._asked:
            return {}
        ready = set(self._replies.ready(list(self._asked.values()), 0.0))
        keys = [key for key, ref in self._asked.items() if ref in ready]
        answers: list[Any] = self._replies.get([self._asked.pop(key) for key in keys], 10.0) if keys else []
        # An exception is a process that died, which is found where it is waited for.
        return {key[:2]: answer for key, answer in zip(keys, answers, strict=True) if isinstance(answer, dict)}


def _named(told: Mapping[tuple[str, int], Mapping[str, float]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for pool in dict.fromkeys(name for name, _ in told):
        ranks = {rank: gauges for (name, rank), gauges in sorted(told.items()) if name == pool}
        if len(ranks) <= EACH:
            metrics |= {f"{pool}-{rank}/{name}": value for rank, of in ranks.items() for name, value in of.items()}
            continue
        for name in dict.fromkeys(name for gauges in ranks.values() for name in gauges):
            values = [gauges[name] for gauges in ranks.values() if name in gauges]
            metrics[f"{pool}/{name}"] = sum(values) / len(values)
            metrics |= {f"{pool}/{name}_least": min(values), f"{pool}/{name}_most": max(values)}
    return metrics
