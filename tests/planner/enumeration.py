"""The least step of everything a search may choose, enumerated without its bounds, its pruning or its memory rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from rlhf_dist.planner.catalogue import Catalogue
from rlhf_dist.planner.cost import cheapest
from rlhf_dist.planner.generation import generation_cost
from rlhf_dist.planner.holdings import Holding
from rlhf_dist.planner.memory import generation_weights
from rlhf_dist.planner.search import INFINITE, Search
from rlhf_dist.planner.step_time import step_seconds
from rlhf_dist.planner.strategy import Generation, Strategy, generation_strategies
from rlhf_dist.planner.transfer import reshard_cost

Seconds = dict[str, float]


class TooLarge(Exception):
    """More combinations than a test should try."""


def least_step(search: Search, most: int = 2_000) -> float:
    """Simulates every combination; infinite if nothing fits. Raises TooLarge above `most` combinations."""
    best, tried = INFINITE, 0
    for partition in search.partitions():
        for sizes in product(search.sizes, repeat=len(partition)):
            if sum(sizes) > search.gpus or (sum(sizes) < search.gpus and not search.idle):
                continue
            pools = [list(_pool(search, block, size, most)) for block, size in zip(partition, sizes, strict=True)]
            for combination in product(*pools):
                tried += 1
                if tried > most:
                    raise TooLarge
                seconds = {name: value for one, _ in combination for name, value in one.items()}
                seconds |= _between(search, {unit: way for _, ways in combination for unit, way in ways.items()})
                step = step_seconds(search.graph, search.pools_of(partition), search.node_seconds(seconds))
                best = min(best, step)
    return best


def _pool(search: Search, block: Sequence[str], gpus: int, most: int) -> Iterator[tuple[Seconds, dict[str, Any]]]:
    """Seconds of a pool's nodes, for every way to hold and to generate that fits; the same seconds once."""
    catalogue, problem = search.catalogue, search.catalogue.problem
    held: list[list[Any]] = [_ways(catalogue, unit, gpus) for unit in block]
    roles = [unit for unit in block if unit in problem.generating and unit not in catalogue.separate]
    generations = [_generations(catalogue, role, gpus) for role in roles]
    if _product(map(len, [*held, *generations])) > most:
        raise TooLarge
    seen: set[Any] = set()
    for ways in product(*held):
        budget = catalogue.usable - sum(_rest(catalogue, unit, way) for unit, way in zip(block, ways, strict=True))
        host = sum(way.host for way in ways if isinstance(way, Holding))
        if budget < 0 or host > catalogue.usable_host:
            continue
        for chosen in product(*generations):
            of_unit = {**dict(zip(block, ways, strict=True))}
            seconds = _seconds(catalogue, of_unit, dict(zip(roles, chosen, strict=True)), budget)
            separate = {u: w for u, w in of_unit.items() if u.partition(".")[0] in catalogue.separate}
            key = (tuple(sorted((seconds or {}).items())), tuple(separate.items()))
            if seconds is not None and key not in seen:
                seen.add(key)
                yield seconds, separate


def _seconds(
    catalogue: Catalogue, ways: dict[str, Any], generations: dict[str, Generation], budget: float
) -> Seconds | None:
    problem, machine, found = catalogue.problem, catalogue.machine, Seconds()
    for unit, way in ways.items():
        role = unit.partition(".")[0]
        model = problem.models[role]
        if isinstance(way, Holding):
            for name, variants in way.variants.items():
                cost = cheapest(variants, budget)
                if cost is None:
                    return None
                found[name] = cost.seconds
        generation = way if isinstance(way, Generation) else generations.get(role)
        own = generation_weights(model, way) if isinstance(way, Generation) else 0.0
        for work in problem.nodes:
            if work.role != role or generation is None:
                continue
            if work.phase == "generate":
                cost = generation_cost(model, work, problem.workload, generation, machine, budget + own)
                if cost is None:
                    return None
                found[work.name] = cost.seconds
            elif work.phase == "reshard" and isinstance(way, Holding):
                found[work.name] = reshard_cost(model, way.strategy, generation, machine).seconds
    return found


def _between(search: Search, ways: dict[str, Any]) -> Seconds:
    """Weight syncs to another pool."""
    found, problem = Seconds(), search.catalogue.problem
    for work in problem.nodes:
        if work.phase == "reshard" and work.role in search.catalogue.separate:
            source: Strategy = ways[work.role].strategy
            target, machine = ways[f"{work.role}.rollout"], search.catalogue.machine
            found[work.name] = reshard_cost(problem.models[work.role], source, target, machine, same_pool=False).seconds
    return found


def _ways(catalogue: Catalogue, unit: str, gpus: int) -> list[Any]:
    role, _, half = unit.partition(".")
    return (
        _generations(catalogue, role, gpus)
        if half
        else list(catalogue._holdings(role, gpus, catalogue.nodes_of(unit), ()))
    )


def _generations(catalogue: Catalogue, role: str, gpus: int) -> list[Generation]:
    node = catalogue.machine.cluster.gpus_per_node
    return list(generation_strategies(catalogue.problem.models[role], gpus, node, catalogue.space))


def _rest(catalogue: Catalogue, unit: str, way: Any) -> float:
    if isinstance(way, Holding):
        return way.rest
    model = catalogue.problem.models[unit.partition(".")[0]]
    return generation_weights(model, way) + catalogue.machine.efficiency.graphs_bytes


def _product(counts: Any) -> int:
    total = 1
    for count in counts:
        total *= count
    return total
