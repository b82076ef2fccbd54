"""The search: partitions of roles into pools x GPUs per pool x strategies, exactly, best first.

    heap of (lower bound, part of the space)
      box         a partition and a range of sizes for each pool      -> halved along its widest range
      plan        partition and sizes, and some of the strategies     -> one entry for each way to decide the next;
                                                                         simulated once everything is decided

Branch and bound rather than dynamic programming: the cost of a plan is that of its schedule, which does not
decompose over pools, but bounds of it (`schedule.bound`) are cheap and nearly tight. A bound takes for every
node the least seconds it has anywhere in the range. The heap is worked off until no bound is below the best
plan found: then that plan is the optimum of the model, gap 0. Runners-up are looked for a while longer.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_dist.planner.boxes import Box, Boxes, Partition, partitions
from rlhf_dist.planner.catalogue import Catalogue
from rlhf_dist.planner.cost import NodeCost
from rlhf_dist.planner.found import Certificate, FoundPlan, SearchResult
from rlhf_dist.planner.holdings import Holding
from rlhf_dist.planner.pools import PoolSpace, Ways
from rlhf_dist.planner.step_time import Graph, bound, step_seconds
from rlhf_dist.planner.strategy import Generation
from rlhf_dist.planner.transfer import reshard_cost

State = tuple[tuple[int, Ways], ...]
"""For each pool its GPUs and what is decided."""
INFINITE = float("inf")
WIDE = 1
"""Sizes in a range, less one, from which its bound looks at FLOPs and bytes only: strategies cost time to try."""

NEAR = 0.01
"""How far a runner-up may be from the best plan of its partition. The optimum is exact."""
EFFORT = 8_000
"""Parts of the space that are looked at for runners-up once the optimum is proven."""
MOST_EXPLORED = 300_000
"""Parts of the space that are looked at for the optimum, about half a minute: enough for 1,024 GPUs and four roles.
Then the gap that is left is reported."""
MOST_SIMULATED = 20_000
"""Plans that are simulated at most; then the gap that is left is reported. List schedules may be longer than their
bound for all plans of a placement alike, which no bound can tell: seen for pools that are given, not for `auto`."""


@dataclass
class Search:
    """One search; `run` does it."""

    catalogue: Catalogue
    sizes: tuple[int, ...]
    """Sizes a pool may have, ascending."""
    allowed: Sequence[Partition] | None = None
    """Partitions to consider; None: all in which no role shares a pool with its own separate generation."""
    fixed: Mapping[tuple[str, ...], int] = field(default_factory=dict)
    """Pool -> its size, where it is given."""
    keep: int = 1
    """Partitions whose best plan is wanted."""
    overlap: bool = True
    """Whether a step may start before the one before has ended, as far as the graph allows."""

    idle: bool = False
    """Whether GPUs may be left over."""

    def __post_init__(self) -> None:
        self.graph = Graph.of(self.catalogue.problem, overlap=self.overlap)
        self.gpus = self.catalogue.machine.cluster.gpus
        self.boxes = Boxes(self.sizes, self.gpus, self.idle)
        self.index = {name: position for position, name in enumerate(self.graph.names)}
        self.host_s = self._host_seconds()
        self.space = PoolSpace(self.catalogue, self._chained())
        self._floors: dict[tuple[str, int, int], dict[str, float]] = {}
        self._smallest: dict[tuple[str, ...], int] = {}

    def run(self) -> SearchResult:
        """Search. Deterministic: equal costs keep the partition that comes first."""
        started = time.perf_counter()
        heap: list[tuple[float, int, int, int, Any]] = []
        every = self.partitions()
        counter = explored = simulated = effort = 0
        left = INFINITE
        best: dict[int, FoundPlan] = {}

        def push(value: float, depth: int, which: int, what: Any) -> None:
            nonlocal counter
            if useful(value, which):
                counter += 1  # Of equal bounds the deepest first: a complete plan prunes the others.
                heapq.heappush(heap, (value, -depth, counter, which, what))

        def limit(which: int) -> float:
            """A bound must be below this to matter: the partition's own best, and the last that is kept."""
            own = best[which].step_s if which in best else INFINITE
            costs = sorted(plan.step_s for plan in best.values())
            return min(own, costs[self.keep - 1] if len(costs) >= self.keep else INFINITE)

        def least() -> float:
            return min((plan.step_s for plan in best.values()), default=INFINITE)

        def useful(value: float, which: int) -> bool:
            """Exact for the optimum; a plan of another partition may be improved upon by less than NEAR."""
            return value < least() or value * (1.0 + NEAR) < limit(which)

        for which, partition in enumerate(every):
            explored += 1
            box = self.boxes.tightened(self.full_box(partition))
            if box is not None:
                push(self.box_bound(partition, box), 0, which, box)
        while heap:
            value, depth, _, which, what = heapq.heappop(heap)
            explored += 1
            if value >= least():  # The optimum is proven: no bound is below it. The rest is for the runners-up.
                effort += 1
                if effort > EFFORT:
                    break
            elif simulated >= MOST_SIMULATED or explored >= MOST_EXPLORED:
                left = value
                while not best:
                    found = self._dived(every[which], what)
                    best |= {} if found is None else {which: found}
                    if not heap:
                        break
                    _, _, _, which, what = heapq.heappop(heap)
                break
            if not useful(value, which):
                continue
            partition = every[which]
            if depth == 0:
                for half in self.boxes.halves(what):
                    if all(low == high for low, high in half):
                        start = tuple((self.sizes[low], ()) for low, _ in half)
                        push(self.state_bound(partition, start), 1, which, start)
                    else:
                        push(self.box_bound(partition, half), 0, which, half)
                continue
            more = self.choices(partition, what)
            if more is not None:
                for deeper in more:
                    push(self.state_bound(partition, deeper), 1 - depth, which, deeper)
                continue
            simulated += 1
            plan = self.priced(partition, what)
            if plan.step_s < limit(which):
                best[which] = plan
        plans = sorted(best.values(), key=lambda plan: plan.step_s)[: self.keep]
        # Unless given up, no part of the space that is left has a bound below the best.
        gap = max(0.0, 1.0 - left / least()) if best and left < INFINITE else 0.0
        certificate = Certificate(gap=gap, explored=explored, partitions=len(every), simulated=simulated)
        return SearchResult(tuple(plans), certificate, time.perf_counter() - started)

    def _dived(self, partition: Partition, what: Any) -> FoundPlan | None:
        """Some plan in a part of the space, always taking the half or the choice with the least bound."""
        if isinstance(what[0][1], int):  # A box.
            while not all(low == high for low, high in what):
                what = min(self.boxes.halves(what), key=lambda half: self.box_bound(partition, half), default=None)
                if what is None:  # No sizes in it add up.
                    return None
            what = tuple((self.sizes[low], ()) for low, _ in what)
        while (more := self.choices(partition, what)) is not None:
            if not more:
                return None
            what = min(more, key=lambda one: self.state_bound(partition, one))
        return self.priced(partition, what) if self.state_bound(partition, what) < INFINITE else None

    def priced(self, partition: Partition, state: State) -> FoundPlan:
        """A plan with everything decided, simulated."""
        pools = tuple(
            self.space.decided(block, gpus, ways) for block, (gpus, ways) in zip(partition, state, strict=True)
        )
        costs = {name: cost for pool in pools for name, cost in pool.costs.items()}
        costs |= self._syncs_between(partition, state)
        seconds = self.node_seconds({name: cost.seconds for name, cost in costs.items()})
        return FoundPlan(partition, pools, costs, step_seconds(self.graph, self.pools_of(partition), seconds))

    def node_seconds(self, seconds: Mapping[str, float]) -> list[float]:
        """Seconds of every node of the graph, host work included."""
        return [seconds.get(name, self.host_s[name]) for name in self.graph.names]

    def pools_of(self, partition: Partition) -> tuple[tuple[int, ...], ...]:
        """Node -> the pools it occupies, by their place in the partition."""
        pool = {unit: index for index, block in enumerate(partition) for unit in block}
        separate = self.catalogue.separate
        found: list[tuple[int, ...]] = []
        for work in self.catalogue.problem.nodes:
            if not work.role:
                found.append(())
            elif work.role in separate and work.phase == "reshard":
                found.append((pool[work.role], pool[f"{work.role}.rollout"]))
            elif work.role in separate and work.phase == "generate":
                found.append((pool[f"{work.role}.rollout"],))
            else:
                found.append((pool[work.role],))
        return tuple(found)

    # --- the space ---------------------------------------------------------------------------------------
    def partitions(self) -> list[Partition]:
        """Partitions to consider."""
        if self.allowed is not None:
            return list(self.allowed)
        return [
            partition
            for partition in partitions(self.catalogue.units)
            if not any(role in block and f"{role}.rollout" in block for block in partition for role in block)
        ]

    def full_box(self, partition: Partition) -> Box:
        """All sizes that the pools of a partition may have."""
        box = []
        for block in partition:
            if block in self.fixed:
                at = self.sizes.index(self.fixed[block])
                box.append((at, at))
            else:
                box.append((self._smallest_size(block), len(self.sizes) - 1))
        return tuple(box)

    def _smallest_size(self, block: tuple[str, ...]) -> int:
        """Index of the least size at which a pool's roles can rest together."""
        if block not in self._smallest:
            usable, rest = self.catalogue.usable, self.catalogue.least_rest
            fits = (at for at, size in enumerate(self.sizes) if sum(rest(unit, size) for unit in block) <= usable)
            self._smallest[block] = next(fits, len(self.sizes))
        return self._smallest[block]

    # --- bounds ------------------------------------------------------------------------------------------
    def box_bound(self, partition: Partition, box: Box) -> float:
        """A lower bound on the step of every plan in a box."""
        seconds: dict[str, float] = {}
        for block, (low, high) in zip(partition, box, strict=True):
            for unit in block:
                if high - low >= WIDE:
                    seconds |= self._floor(unit, low, high)
                    continue
                found = [self.catalogue.candidates(unit, self.sizes[at]).best for at in range(low, high + 1)]
                for work in self.catalogue.nodes_of(unit):
                    least = min(best.get(work.name, INFINITE) for best in found)
                    if least == INFINITE:
                        return INFINITE
                    seconds[work.name] = least
        return self._lowered(partition, seconds)

    def _floor(self, unit: str, low: int, high: int) -> dict[str, float]:
        key = (unit, low, high)
        if key not in self._floors:
            self._floors[key] = self.catalogue.floor(unit, self.sizes[low], self.sizes[high])
        return self._floors[key]

    def state_bound(self, partition: Partition, state: State) -> float:
        """A lower bound on the step whatever is still decided; infinite if nothing fits."""
        seconds: dict[str, float] = {}
        for block, (gpus, ways) in zip(partition, state, strict=True):
            found = self.space.seconds(block, gpus, ways)
            if found is None:
                return INFINITE
            seconds |= found
        seconds |= {name: cost.seconds for name, cost in self._syncs_between(partition, state).items()}
        return self._lowered(partition, seconds)

    def choices(self, partition: Partition, state: State) -> list[State] | None:
        """The state with the first open decision made in every possible way; None if nothing is open."""
        for at, (block, (gpus, ways)) in enumerate(zip(partition, state, strict=True)):
            choices = self.space.choices(block, gpus, ways)
            if choices is not None:
                return [(*state[:at], (gpus, (*ways, way)), *state[at + 1 :]) for way in choices]
        return None

    def _lowered(self, partition: Partition, seconds: Mapping[str, float]) -> float:
        return bound(self.graph, self.pools_of(partition), self.node_seconds(seconds))

    # --- costs -------------------------------------------------------------------------------------------
    def _syncs_between(self, partition: Partition, state: State) -> dict[str, NodeCost]:
        """Weight syncs to another pool, where both ends are decided."""
        decided = {
            unit: way
            for block, (_, ways) in zip(partition, state, strict=True)
            for unit, way in zip(block, ways, strict=False)
        }
        costs: dict[str, NodeCost] = {}
        for work in self.catalogue.problem.nodes:
            if work.phase == "reshard" and work.role in self.catalogue.separate:
                source, target = decided.get(work.role), decided.get(f"{work.role}.rollout")
                if isinstance(source, Holding) and isinstance(target, Generation):
                    model, machine = self.catalogue.problem.models[work.role], self.catalogue.machine
                    costs[work.name] = reshard_cost(model, source.strategy, target, machine, same_pool=False)
        return costs

    def _chained(self) -> frozenset[str]:
        """Roles that `Graph.chained` holds for, from generation to weight sync, both at every step."""
        nodes = self.catalogue.problem.nodes
        takes_time = [bool(work.role) or self.host_s[work.name] > 0.0 for work in nodes]
        found: set[str] = set()
        for role in self.catalogue.problem.generating:
            mine = [work for work in nodes if work.role == role and work.phase in ("generate", "reshard")]
            syncs = [self.index[work.name] for work in mine if work.phase == "reshard"]
            first = [self.index[work.name] for work in mine if work.phase == "generate"]
            if len(syncs) == 1 and all(work.every == 1 for work in mine):
                if self.graph.chained(first, syncs[0], takes_time):
                    found.add(role)
        return frozenset(found)

    def _host_seconds(self) -> dict[str, float]:
        """Host ops work through the step's tokens; sources, joins and states take no time to speak of."""
        load, speed = self.catalogue.problem.workload, self.catalogue.machine.efficiency.host_tokens_per_s
        return {
            work.name: work.rows * load.row_tokens / speed
            if self.catalogue.problem.dataflow[work.name].kind == "host"
            else 0.0
            for work in self.catalogue.problem.nodes
        }
