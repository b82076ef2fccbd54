"""When nothing fits: which phase and which tensors are to blame, and the smallest cluster that would do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from rlhf_dist.hardware import Cluster
from rlhf_dist.planner.boxes import Box, Partition
from rlhf_dist.planner.catalogue import Catalogue, Wanted
from rlhf_dist.planner.generation import least_cache_bytes
from rlhf_dist.planner.holdings import Holding
from rlhf_dist.planner.memory import generation_weights, gib, resting_bytes
from rlhf_dist.planner.search import INFINITE, Search, State
from rlhf_dist.planner.work import NodeWork
from rlhf_dist.typed import ConfigError

MOST_NODES = 4096
MOST_TRIED = 500
"""Looks at one partition for anything that fits."""


@dataclass(frozen=True)
class Blame:
    """The need that is hardest to meet."""

    node: str
    phase: str
    tensors: str
    """The largest class of tensors of it."""
    tensor_bytes: float
    needed: float
    """Bytes per GPU at least, with what rests of the roles beside it."""


def blame(search: Search, *, offload: bool = True) -> Blame:
    """What needs most memory when all roles share all GPUs, each held in the least memory it can be."""
    catalogue = search.catalogue
    gpus = max(search.fixed.values(), default=search.gpus)
    found = {
        unit: [one for one in catalogue.least_holdings(unit, gpus) if offload or not one.strategy.offload]
        for unit in catalogue.units
    }
    resting = {unit: min((one.rest for one in ways), default=0.0) for unit, ways in found.items()}
    together = sum(resting.values())
    worst: Blame | None = None
    for unit, ways in found.items():
        role = unit.partition(".")[0]
        model, trained = catalogue.problem.models[role], role in catalogue.problem.trained
        for work in catalogue.nodes_of(unit):
            needs: list[dict[str, float]] = []
            if work.phase == "generate":
                for one in catalogue.candidates(unit, gpus).generations:
                    cache = least_cache_bytes(model, catalogue.problem.workload, one)
                    needs.append({"weights for generation": generation_weights(model, one), "kv_cache": cache})
            elif work.phase in ("train", "infer"):
                needs = [_needs(holding, work.name, model, trained) for holding in ways if holding.variants[work.name]]
            if not needs:
                continue
            least = min(needs, key=lambda need: sum(need.values()))
            largest = max(least, key=lambda name: least[name])
            others = together - (resting[unit] if work.phase != "generate" else 0.0)
            total = sum(least.values()) + others
            if worst is None or total > worst.needed:
                worst = Blame(work.name, work.phase, largest, least[largest], total)
    assert worst is not None, "a problem has a node with a model"
    return worst


def _needs(holding: Holding, node: str, model: object, trained: bool) -> dict[str, float]:
    from rlhf_dist.model_specs import ModelSpec

    assert isinstance(model, ModelSpec), "a role with a holding has a model"
    rest = resting_bytes(model, holding.strategy, trained=trained)
    rest["graphs"] = holding.rest - sum(rest.values())
    active = holding.variants[node][0][1].memory
    return {name: rest.get(name, 0.0) + active.get(name, 0.0) for name in {**rest, **active}}


def what_is_missing(search: Search) -> str:
    """The need that is not met, in a clause."""
    worst, unless = blame(search), ""
    usable = search.catalogue.usable
    if worst.needed <= usable:  # With everything offloaded it would fit: then the host is too small for that.
        worst = blame(search, offload=False)
        unless = f", unless more is offloaded than a host with {gib(search.catalogue.usable_host)} for each GPU takes"
    if worst.phase == "generate" and not search.catalogue.space.generation_pipeline:
        unless = f"{unless} (a replica of the engines here is inside one node)"
    gpu = search.catalogue.machine.cluster.gpu
    return (
        f"{worst.node} ({worst.phase}) needs at least {gib(worst.needed)} per GPU{unless}, most of it {worst.tensors} "
        f"({gib(worst.tensor_bytes)}), and each {gpu.name} has {gib(usable)} for tensors"
    )


def cannot_fit(search: Search, cluster: Cluster, fits: Callable[[Cluster], bool]) -> str:
    """The message for models that fit nowhere on `cluster`."""
    smallest = smallest_cluster(cluster, fits)
    advice = (
        f"the smallest cluster that would do is {smallest.text}"
        if smallest is not None
        else f"no number of {cluster.gpu.name} would do; take a GPU with more memory, shorter rows or a smaller model"
    )
    if smallest is not None and smallest.nodes <= cluster.nodes:
        advice = f"{cluster.text} would do with another placement or other strategies: use placement: auto"
    return f"the models do not fit on {cluster.text}: {what_is_missing(search)}; {advice}"


def smallest_cluster(cluster: Cluster, fits: Callable[[Cluster], bool]) -> Cluster | None:
    """The same nodes, as few as hold the models; None if no number does."""
    if fits(cluster.resized(1)):
        return cluster.resized(1)
    below, above = 1, 2
    while not fits(cluster.resized(above)):
        below, above = above, above * 2
        if above > MOST_NODES:
            return None
    while above - below > 1:
        middle = (below + above) // 2
        if fits(cluster.resized(middle)):
            above = middle
        else:
            below = middle
    return cluster.resized(above)


def anything_fits(search: Search) -> bool:
    """Whether there is a plan: one with a finite bound once everything is decided.

    Roles that share all GPUs need least memory, so few pools come first, and a partition is left after MOST_TRIED
    looks: without an end, a cluster a little too small would be enumerated whole.
    """
    for partition in sorted(search.partitions(), key=len):
        box = search.boxes.tightened(search.full_box(partition))
        if box is not None and search.box_bound(partition, box) < INFINITE:
            if _some(search, partition, box, iter(range(MOST_TRIED))):
                return True
    return False


def _some(search: Search, partition: Partition, box: Box, looks: Iterator[int]) -> bool:
    """Depth first for anything that fits in a box, as long as there are looks left."""
    if next(looks, None) is None:
        return False
    if not all(low == high for low, high in box):
        halves = (half for half in search.boxes.halves(box) if search.box_bound(partition, half) < INFINITE)
        return any(_some(search, partition, half, looks) for half in halves)
    stack: list[State] = [tuple((search.sizes[low], ()) for low, _ in box)]
    while stack and next(looks, None) is not None:
        state = stack.pop()
        if search.state_bound(partition, state) == INFINITE:
            continue
        more = search.choices(partition, state)
        if more is None:
            return True
        stack.extend(more[::-1])
    return False


def check_holdings(search: Search, wanted: Wanted, pools: Mapping[str, tuple[tuple[str, ...], int]]) -> None:
    """Raise ConfigError for a role that has no holding, whatever the memory, and say which rule is broken.

    wanted: what is asked of nodes' strategies. pools: name -> (units, GPUs), where pools are given.
    """
    catalogue = search.catalogue
    for unit in catalogue.units:
        named = [work for work in catalogue.nodes_of(unit) if wanted.get(work.name)]
        sizes = [size for units, size in pools.values() if unit in units] or list(search.sizes)
        model = catalogue.problem.models[unit.partition(".")[0]]
        for work in named:
            alone = replace(catalogue, wanted={work.name: wanted[work.name]}, _made={}, _copies={})
            found = (
                alone.candidates(unit, size).generations
                if work.phase == "generate"
                else alone.least_holdings(unit, size)
                for size in sizes
            )
            if not any(found):
                asked = ", ".join(f"{field}: {value}" for field, value in wanted[work.name].items())
                where = f"{sizes[0]} GPUs" if len(sizes) == 1 else f"up to {sizes[-1]} GPUs"
                why = "; ".join(_broken(catalogue, wanted[work.name], sizes, work))
                raise ConfigError(f"placement.strategies: {work.name} cannot run as {{{asked}}} on {where}: {why}")
        if "." not in unit and not any(catalogue.least_holdings(unit, size) for size in sizes):
            stages = ", ".join(map(str, catalogue.space.pipeline))
            raise ConfigError(
                f"{unit} cannot be held on up to {sizes[-1]} GPUs: pipelines of {stages} stages must divide the GPUs "
                f"of a pool and be no longer than the model's {model.layers} layers; add 1 to `pipeline`"
            )


def _broken(catalogue: Catalogue, wanted: Mapping[str, Any], sizes: list[int], work: NodeWork) -> list[str]:
    """The rules that a strategy breaks."""
    model, node = catalogue.problem.models[work.role], catalogue.machine.cluster.gpus_per_node
    found: list[str] = []
    for axis in ("tp", "sp"):
        if model.heads % wanted.get(axis, 1) or node % wanted.get(axis, 1):
            found.append(f"{axis} must divide the {model.heads} attention heads and the {node} GPUs of a node")
    if wanted.get("tp", 1) > 1 and wanted.get("sp", 1) > 1:
        found.append("tp spreads sequences already, so sp must be 1 beside it")
    if wanted.get("pp", 1) > model.layers:
        found.append(f"pp must be at most the {model.layers} layers")
    axes = [axis for axis in ("tp", "sp", "pp", "dp") if axis in wanted]
    product = prod(int(wanted[axis]) for axis in axes)
    if "dp" in wanted and product not in sizes and len(axes) == 4:
        found.append(f"tp x sp x pp x dp = {product} must be the GPUs of the pool")
    elif all(size % product for size in sizes):
        found.append(f"{' x '.join(axes)} = {product} must divide the GPUs of the pool")
    if work.role in catalogue.problem.trained and wanted.get("zero") == 0:
        found.append("zero is 1 to 3 for a role that learns")
    return found or ["the engines here have ZeRO-1 and offloading without tp and sp only, and generate inside a node"]
