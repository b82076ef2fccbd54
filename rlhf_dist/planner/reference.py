"""HybridFlow's Algorithm 1 (arXiv 2409.19256, section 6) as printed, to compare with. Not used for planning.

    for plm in get_placements(D, L, N):              set partitions of the models
      A_min = get_min_alloc(plm, Q, N)               fewest GPUs per colocated set without running out of memory
      for A in enum_alloc(N, A_min):                 every way to give N GPUs to the sets
        for each model in each set: strategy = auto_parallel(A, A_min, l, W)          Algorithm 2, cached
        cost = d_cost(D, plm, W); keep the best

    d_cost = sum over stages (generation, preparation, training) of max over sets of the sum over the set's models
    auto_parallel: for t in {t_min..U}, p in {p_min..N_l/U}: d = N_l / (p t); keep the least simu

Guards that the printed text needs: t divides the heads and p the layers or leaves less than one over; t p divides
N_l; the range of p is {1} where N_l < U; p_min and t_min come from memory, here by trying. simu is this planner's own
latency model, ZeRO-1 (Megatron's distributed optimizer), so that only the searches differ. Memory between roles that
share a set is looked at in get_min_alloc alone, as printed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rlhf_dist.planner.boxes import Partition, partitions
from rlhf_dist.planner.catalogue import Catalogue
from rlhf_dist.planner.cost import cheapest
from rlhf_dist.planner.latency import inference_variants, training_variants
from rlhf_dist.planner.memory import resting_bytes
from rlhf_dist.planner.strategy import Generation, Strategy
from rlhf_dist.planner.work import NodeWork

INFINITE = float("inf")
STAGES = ("generate", "infer", "train")


@dataclass(frozen=True)
class Mapped:
    """What Algorithm 1 returns."""

    partition: Partition
    sizes: tuple[int, ...]
    strategies: dict[str, Strategy]
    generations: dict[str, Generation]
    stage_cost_s: float
    """Its own d_cost; not the time of a schedule."""
    search_s: float
    allocations: int


@dataclass
class Algorithm1:
    """The search as printed, over a catalogue's problem and machine."""

    catalogue: Catalogue
    cached: bool = True
    """Whether d_cost takes seconds found by auto_parallel, too. As printed it calls simu for every allocation."""
    _parallel: dict[tuple[str, int], tuple[dict[str, float], Strategy | None, Generation | None]] = field(
        default_factory=dict
    )
    allocations: int = 0

    def run(self) -> Mapped | None:
        """The best mapping by its own cost; None if nothing fits."""
        started = time.perf_counter()
        gpus = self.catalogue.machine.cluster.gpus
        best: tuple[float, Partition, tuple[int, ...]] | None = None
        for partition in partitions(self.catalogue.problem.roles):
            least = tuple(self.min_alloc(block) for block in partition)
            if sum(least) > gpus:
                continue
            for sizes in enum_alloc(gpus, least):
                self.allocations += 1
                cost = self.d_cost(partition, sizes)
                if cost < INFINITE and (best is None or cost < best[0]):
                    best = (cost, partition, sizes)
        if best is None:
            return None
        cost, partition, sizes = best
        found = {role: self.auto_parallel(role, n) for block, n in zip(partition, sizes, strict=True) for role in block}
        return Mapped(
            partition=partition,
            sizes=sizes,
            strategies={role: one[1] for role, one in found.items() if one[1] is not None},
            generations={role: one[2] for role, one in found.items() if one[2] is not None},
            stage_cost_s=cost,
            search_s=time.perf_counter() - started,
            allocations=self.allocations,
        )

    def min_alloc(self, block: tuple[str, ...]) -> int:
        """Fewest GPUs on which a set's models can rest together."""
        problem, usable = self.catalogue.problem, self.catalogue.usable
        for gpus in range(1, self.catalogue.machine.cluster.gpus + 1):
            rest = 0.0
            for role in block:
                model, trained = problem.models[role], role in problem.trained
                ways = [
                    sum(resting_bytes(model, one, trained=trained).values()) for one in self._strategies(role, gpus)
                ]
                rest += min(ways, default=INFINITE)
            if rest <= usable:
                return gpus
        return self.catalogue.machine.cluster.gpus + 1

    def d_cost(self, partition: Partition, sizes: tuple[int, ...]) -> float:
        """Per stage the slowest set, each set's models one after another; stages one after another."""
        total = 0.0
        found = [[self._stages(role, n) for role in block] for block, n in zip(partition, sizes, strict=True)]
        for stage in STAGES:
            total += max(sum(costs[stage] for costs in block) for block in found)
        return total

    def _stages(self, role: str, gpus: int) -> dict[str, float]:
        costs, strategy, _ = self.auto_parallel(role, gpus)
        if self.cached or strategy is None:
            return costs
        again = self._simu(role, self.catalogue.nodes_of(role), strategy)
        assert again is not None, "auto_parallel takes only what fits"
        return {**again, "generate": costs["generate"]}

    def auto_parallel(self, role: str, gpus: int) -> tuple[dict[str, float], Strategy | None, Generation | None]:
        """Algorithm 2: seconds by stage under the best (t, p) of a role on so many GPUs."""
        key = (role, gpus)
        if key not in self._parallel:
            self._parallel[key] = self._auto_parallel(role, gpus)
        return self._parallel[key]

    def _auto_parallel(self, role: str, gpus: int) -> tuple[dict[str, float], Strategy | None, Generation | None]:
        nodes = self.catalogue.nodes_of(role)
        best: tuple[float, dict[str, float], Strategy] | None = None
        for strategy in self._strategies(role, gpus):
            costs = self._simu(role, nodes, strategy)
            if costs is not None and (best is None or sum(costs.values()) < best[0]):
                best = (sum(costs.values()), costs, strategy)
        if best is None:
            return dict.fromkeys(STAGES, INFINITE), None, None
        _, costs, strategy = best
        model, usable = self.catalogue.problem.models[role], self.catalogue.usable
        rest = sum(resting_bytes(model, strategy, trained=role in self.catalogue.problem.trained).values())
        rest += self.catalogue.machine.efficiency.graphs_bytes
        generation: Generation | None = None
        generating = [work for work in nodes if work.phase == "generate"]
        if generating:
            ways: list[tuple[float, Generation]] = []
            for one in self.catalogue.candidates(role, gpus).generations:
                found = [self.catalogue.generation(work, one, usable - rest) for work in generating]
                if all(cost is not None for cost in found):
                    ways.append((sum(cost.seconds for cost in found if cost is not None), one))
            if not ways:
                return dict.fromkeys(STAGES, INFINITE), None, None
            costs["generate"], generation = min(ways, key=lambda way: way[0])
        return costs, strategy, generation

    def _strategies(self, role: str, gpus: int) -> Iterator[Strategy]:
        """(t, p, d) with t up to the GPUs of a node and p up to the nodes, guards included."""
        model, node = self.catalogue.problem.models[role], self.catalogue.machine.cluster.gpus_per_node
        trained = role in self.catalogue.problem.trained
        for t in range(1, min(node, gpus) + 1):
            if model.heads % t or node % t:
                continue
            for p in range(1, max(1, gpus // node) + 1):
                if gpus % (t * p) == 0 and p <= model.layers:
                    yield Strategy(gpus=gpus, tp=t, pp=p, zero=1 if trained else 0)

    def _simu(self, role: str, nodes: tuple[NodeWork, ...], strategy: Strategy) -> dict[str, float] | None:
        catalogue = self.catalogue
        model, load = catalogue.problem.models[role], catalogue.problem.workload
        trained = role in catalogue.problem.trained
        budget = catalogue.usable - sum(resting_bytes(model, strategy, trained=trained).values())
        seconds = dict.fromkeys(STAGES, 0.0)
        for work in nodes:
            if work.phase == "train":
                ways = training_variants(model, work, load, strategy, catalogue.machine)
            elif work.phase == "infer":
                ways = inference_variants(model, work, load, strategy, catalogue.machine, trained=trained)
            else:
                continue
            cost = cheapest(ways, budget)
            if cost is None:
                return None
            seconds[work.phase] += cost.seconds
        return seconds


def enum_alloc(gpus: int, least: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All ways to give `gpus` GPUs to sets that need at least so many each."""
    if len(least) == 1:
        if gpus >= least[0]:
            yield (gpus,)
        return
    for first in range(least[0], gpus - sum(least[1:]) + 1):
        for rest in enum_alloc(gpus - first, least[1:]):
            yield (first, *rest)
