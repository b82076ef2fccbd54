"""What a search returns: plans with everything decided, and why the best is the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_dist.planner.boxes import Partition
from rlhf_dist.planner.cost import NodeCost
from rlhf_dist.planner.pools import Pool


@dataclass(frozen=True)
class FoundPlan:
    """A placement with everything decided, and its cost."""

    partition: Partition
    pools: tuple[Pool, ...]
    costs: Mapping[str, NodeCost]
    """Node -> cost, weight syncs between pools included; host work is not in it."""
    step_s: float


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Why the best plan is the best."""

    gap: float
    """(best - least bound left) / best; 0: nothing in the space is better."""
    explored: int
    """Parts of the space that were looked at."""
    partitions: int
    """Partitions in the space."""
    simulated: int
    """Plans that were simulated."""


@dataclass(frozen=True)
class SearchResult:
    """The best plan of each of the best partitions, best first; empty if nothing fits."""

    plans: tuple[FoundPlan, ...]
    certificate: Certificate
    search_s: float

    def joined(self, other: SearchResult, keep: int) -> SearchResult:
        """The best of two searches over the same partitions."""
        best: dict[Partition, FoundPlan] = {}
        for plan in (*self.plans, *other.plans):
            if plan.partition not in best or plan.step_s < best[plan.partition].step_s:
                best[plan.partition] = plan
        plans = tuple(sorted(best.values(), key=lambda plan: plan.step_s))[:keep]
        one, two = self.certificate, other.certificate
        certificate = Certificate(
            gap=max(one.gap, two.gap),
            explored=one.explored + two.explored,
            partitions=one.partitions,
            simulated=one.simulated + two.simulated,
        )
        return SearchResult(plans, certificate, self.search_s + other.search_s)
