"""One pool and the roles on it: memory ties them together.

What rests of all roles, and what the node at work needs, share a GPU. A pool is decided one thing at a time (a
holding for each unit, then how each role generates); seconds of a pool that is not fully decided are a lower
bound: what is open rests in the least memory it can and runs as fast as the rest of the memory allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf_dist.planner.catalogue import Catalogue
from rlhf_dist.planner.cost import NodeCost, cheapest
from rlhf_dist.planner.holdings import Holding
from rlhf_dist.planner.memory import generation_weights
from rlhf_dist.planner.strategy import Generation, Strategy
from rlhf_dist.planner.transfer import reshard_cost
from rlhf_dist.planner.work import NodeWork

Way = Holding | Generation
Ways = tuple[Way, ...]


@dataclass(frozen=True)
class Pool:
    """A pool with everything decided."""

    units: tuple[str, ...]
    gpus: int
    holdings: Mapping[str, Strategy]
    """Role -> how it is held here."""
    generations: Mapping[str, Generation]
    """Role -> how it generates here."""
    costs: Mapping[str, NodeCost]
    """Node -> cost; a weight sync to another pool is not in it."""


@dataclass
class PoolSpace:
    """What can be decided about every (units, GPUs), and what nodes then cost."""

    catalogue: Catalogue
    chained: frozenset[str] = frozenset()
    """Roles whose generation comes before everything that takes time on the way to their weight sync (`Graph.chained`).
    What is open of both is then bounded together: more GPUs a replica sync faster and may generate slower."""
    _seconds: dict[tuple[tuple[str, ...], int, Ways], Mapping[str, float] | None] = field(default_factory=dict)

    def choices(self, units: tuple[str, ...], gpus: int, decided: Ways) -> tuple[Way, ...] | None:
        """What the next decision may be; None if everything is decided."""
        if len(decided) < len(units):
            one = self.catalogue.candidates(units[len(decided)], gpus)
            # Of equals the one that rests in most memory first: it moves least.
            return one.holdings[::-1] or one.generations
        roles = self.generating(units)
        at = len(decided) - len(units)
        return self.catalogue.candidates(roles[at], gpus).generations if at < len(roles) else None

    def generating(self, units: tuple[str, ...]) -> tuple[str, ...]:
        """Roles that generate here with weights they are trained with here."""
        problem, separate = self.catalogue.problem, self.catalogue.separate
        return tuple(unit for unit in units if unit in problem.generating and unit not in separate)

    def seconds(self, units: tuple[str, ...], gpus: int, decided: Ways) -> Mapping[str, float] | None:
        """Node -> least seconds under what is decided so far; None if it does not fit."""
        key = (units, gpus, decided)
        if key not in self._seconds:
            self._seconds[key] = self._least_seconds(units, gpus, decided)
        return self._seconds[key]

    def decided(self, units: tuple[str, ...], gpus: int, decided: Ways) -> Pool:
        """The pool, all of it decided, with full costs."""
        catalogue = self.catalogue
        budget = catalogue.usable - sum(self._rest(unit, way) for unit, way in zip(units, decided, strict=False))
        generations = dict(zip(self.generating(units), decided[len(units) :], strict=True))
        holdings: dict[str, Strategy] = {}
        costs: dict[str, NodeCost | None] = {}
        for unit, way in zip(units, decided, strict=False):
            role = unit.partition(".")[0]
            if isinstance(way, Generation):
                generations[role] = way
            else:
                holdings[role] = way.strategy
                costs |= {name: cheapest(variants, budget) for name, variants in way.variants.items()}
            for work in catalogue.nodes_of(unit):
                if work.phase == "generate":
                    own = self._weights(unit, way) if isinstance(way, Generation) else 0.0
                    generation = generations[role]
                    assert isinstance(generation, Generation), "holdings come first, generation strategies after"
                    costs[work.name] = catalogue.generation(work, generation, budget + own)
                elif work.phase == "reshard":
                    generation = generations[role]
                    assert isinstance(generation, Generation) and isinstance(way, Holding), "as above"
                    model = catalogue.problem.models[role]
                    costs[work.name] = reshard_cost(model, way.strategy, generation, catalogue.machine)
        final = {name: cost for name, cost in costs.items() if cost is not None}
        assert len(final) == len(costs), "a pool that does not fit is not decided upon"
        chosen = {role: one for role, one in generations.items() if isinstance(one, Generation)}
        return Pool(units, gpus, holdings, chosen, final)

    def _rest(self, unit: str, way: Way) -> float:
        if isinstance(way, Holding):
            return way.rest
        return self._weights(unit, way) + self.catalogue.machine.efficiency.graphs_bytes

    def _weights(self, unit: str, way: Generation) -> float:
        return generation_weights(self.catalogue.problem.models[unit.partition(".")[0]], way)

    def _least_seconds(self, units: tuple[str, ...], gpus: int, decided: Ways) -> Mapping[str, float] | None:
        catalogue = self.catalogue
        found = [catalogue.candidates(unit, gpus) for unit in units]
        rests = [
            self._rest(unit, decided[at]) if at < len(decided) else found[at].least_rest
            for at, unit in enumerate(units)
        ]
        budget = catalogue.usable - sum(rests)
        hosted = sum(way.host for way in decided if isinstance(way, Holding))
        if budget < 0 or hosted > catalogue.usable_host:
            return None
        seconds: dict[str, float] = {}
        for at, one in enumerate(found):
            holdings, slack = one.holdings, one.least_rest
            if at < len(decided):
                way = decided[at]
                holdings, slack = ((way,), 0.0) if isinstance(way, Holding) else ((), rests[at])
            for name in holdings[0].variants if holdings else ():
                fastest = None
                for holding in holdings:
                    cost = cheapest(holding.variants[name], budget + slack - (holding.rest if slack else 0.0))
                    if cost is not None and (fastest is None or cost.seconds < fastest):
                        fastest = cost.seconds
                if fastest is None:
                    return None
                seconds[name] = fastest
            if not self._generate(units, gpus, decided, at, holdings, budget, rests[at], seconds):
                return None
        return seconds

    def _generate(
        self,
        units: tuple[str, ...],
        gpus: int,
        decided: Ways,
        at: int,
        holdings: tuple[Holding, ...],
        budget: float,
        rest: float,
        seconds: dict[str, float],
    ) -> bool:
        """Adds the least seconds of a unit's generating nodes and weight sync; False if they do not fit."""
        catalogue, unit = self.catalogue, units[at]
        nodes = [work for work in catalogue.nodes_of(unit) if work.phase in ("generate", "reshard")]
        if not nodes:
            return True
        every = catalogue.candidates(unit, gpus).generations
        roles = self.generating(units)
        place = len(units) + roles.index(unit) if unit in roles else at
        way = decided[place] if place < len(decided) else None
        asked = [number for number, one in enumerate(every) if way is None or one == way]
        # What generates only has its weights in what rests.
        own = rest - catalogue.machine.efficiency.graphs_bytes if unit not in roles else 0.0
        ways: list[dict[str, float]] = []
        for number in asked:
            way_s = self._way_seconds(nodes, every[number], number, holdings, budget, own)
            if way_s is not None:
                ways.append(way_s)
        if not ways:
            return False
        least = {work.name: min(one[work.name] for one in ways) for work in nodes}
        syncs = [work.name for work in nodes if work.phase == "reshard"]
        if syncs and unit in self.chained:
            least[syncs[0]] += min(sum(one.values()) for one in ways) - sum(least.values())
        seconds |= least
        return True

    def _way_seconds(
        self,
        nodes: list[NodeWork],
        way: Generation,
        number: int,
        holdings: tuple[Holding, ...],
        budget: float,
        own: float,
    ) -> dict[str, float] | None:
        """Least seconds of generating and syncing one way, the `number`th; None if it does not fit."""
        seconds: dict[str, float] = {}
        for work in nodes:
            if work.phase == "generate":
                cost = self.catalogue.generation(work, way, budget + own)
                if cost is None:
                    return None
                seconds[work.name] = cost.seconds
            elif generation_weights(self.catalogue.problem.models[work.role], way) > budget:
                return None
            else:
                seconds[work.name] = min(holding.reshard[number] for holding in holdings)
        return seconds
