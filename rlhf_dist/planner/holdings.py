"""Ways to hold one role on so many GPUs, each with what its nodes then cost; dominated ones are left out.

    holding: bytes at rest + for every node a staircase of (bytes needed, cost)

A holding is dominated if another one rests in no more memory and, in whatever memory is left, runs every node no
slower. That is decided on the staircases, so it is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rlhf_dist.planner.cost import Variants, cheapest
from rlhf_dist.planner.strategy import Generation, Strategy


@dataclass(frozen=True, eq=False)
class Holding:
    """One way to hold a role."""

    strategy: Strategy
    rest: float
    """Bytes per GPU at all times."""
    variants: Mapping[str, Variants]
    """Training and inference node -> ways to run it."""
    host: float = 0.0
    """Bytes in the host's memory for each GPU."""
    reshard: tuple[float, ...] = ()
    """Seconds of the weight sync to each generation strategy of the role, where it generates in this pool."""

    def dominates(self, other: Holding) -> bool:
        """Whether this one is at least as good in every respect."""
        if self.rest > other.rest or self.host > other.host:
            return False
        if any(a > b for a, b in zip(self.reshard, other.reshard, strict=True)):
            return False
        for node, theirs in other.variants.items():
            # The fastest way first: most holdings that dominate nothing are found out there.
            for need, cost in theirs[::-1]:
                mine = cheapest(self.variants[node], need + other.rest - self.rest)
                if mine is None or mine.seconds > cost.seconds:
                    return False
        return True


@dataclass(frozen=True)
class Candidates:
    """All that can be done with one role on so many GPUs."""

    holdings: tuple[Holding, ...]
    generations: tuple[Generation, ...]
    least_rest: float
    """Bytes at rest of the holding with the fewest."""
    best: Mapping[str, float]
    """Node -> seconds if the role had its GPUs to itself: nothing is faster. Missing: it cannot run at all."""


def undominated(holdings: Iterator[Holding]) -> tuple[Holding, ...]:
    """Holdings that no other one dominates; of equals the first."""
    kept: list[Holding] = []
    for holding in sorted(holdings, key=lambda one: one.rest):
        if not any(other.dominates(holding) for other in kept):
            kept.append(holding)
    return tuple(kept)
