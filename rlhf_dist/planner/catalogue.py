"""All that can be done with each role on so many GPUs, made when a search asks for it.

(role, GPUs) -> strategies -> holdings that none dominates, generation strategies, least seconds of every node
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from rlhf_dist.model_specs import ModelSpec
from rlhf_dist.planner.cost import NodeCost, Variants, cheapest, staircase
from rlhf_dist.planner.generation import generation_cost, generation_floor_s
from rlhf_dist.planner.holdings import Candidates, Holding, undominated
from rlhf_dist.planner.latency import floor_s, inference_variants, training_variants
from rlhf_dist.planner.memory import WEIGHT_BYTES, generation_weights, host_bytes, resting_bytes, usable_bytes
from rlhf_dist.planner.rates import Machine
from rlhf_dist.planner.strategy import (
    Generation,
    Space,
    Strategy,
    frozen_strategies,
    generation_strategies,
    training_strategies,
)
from rlhf_dist.planner.transfer import total_reshard_s
from rlhf_dist.planner.work import NodeWork, Problem

FULL_COPIES = Space(offload=False, frozen_zero=(0,))
"""Holdings that inference of a trained role may copy its weights to."""
Wanted = Mapping[str, Mapping[str, Any]]
"""Node name -> fields of its strategy that are given: tp, pp, sp, dp, zero, offload, recompute."""


@dataclass
class Catalogue:
    """Holdings of all roles of a problem, made when asked for."""

    problem: Problem
    machine: Machine
    space: Space
    separate: frozenset[str] = frozenset()
    """Roles that generate in a pool of their own (`ROLE.rollout`)."""
    wanted: Wanted = field(default_factory=dict)
    _made: dict[tuple[str, int], Candidates] = field(default_factory=dict)
    _least_rests: dict[tuple[str, int], float] = field(default_factory=dict)
    _copies: dict[tuple[str, int], list[tuple[Strategy, float, Variants]]] = field(default_factory=dict)
    _generated: dict[tuple[str, Generation, float], NodeCost | None] = field(default_factory=dict)

    @cached_property
    def usable(self) -> float:
        """Bytes of a GPU for tensors."""
        return usable_bytes(self.machine.cluster, self.machine.efficiency)

    @cached_property
    def usable_host(self) -> float:
        """Bytes of host memory for each GPU: the system and the object store keep a fifth."""
        return 0.8 * self.machine.cluster.gpu.host_memory_bytes

    @cached_property
    def units(self) -> tuple[str, ...]:
        """What is placed: roles, and the generating halves of those that generate elsewhere."""
        return (*self.problem.roles, *(f"{role}.rollout" for role in self.problem.roles if role in self.separate))

    def nodes_of(self, unit: str) -> tuple[NodeWork, ...]:
        """Nodes that run on a unit alone. The weight sync of a role that generates elsewhere belongs to two."""
        role, _, half = unit.partition(".")
        mine = [work for work in self.problem.nodes if work.role == role]
        if half:
            return tuple(work for work in mine if work.phase == "generate")
        if role in self.separate:
            return tuple(work for work in mine if work.phase not in ("generate", "reshard"))
        return tuple(mine)

    def candidates(self, unit: str, gpus: int) -> Candidates:
        """Holdings and generation strategies of a unit on so many GPUs."""
        key = (unit, gpus)
        if key not in self._made:
            self._made[key] = self._make(unit, gpus)
        return self._made[key]

    def least_rest(self, unit: str, gpus: int) -> float:
        """Bytes per GPU that a unit holds at rest at least, whatever else it needs."""
        key = (unit, gpus)
        if key not in self._least_rests:
            role, _, half = unit.partition(".")
            model, node_gpus = self.problem.models[role], self.machine.cluster.gpus_per_node
            if half:
                ways = [
                    generation_weights(model, one) + self.machine.efficiency.graphs_bytes
                    for one in generation_strategies(model, gpus, node_gpus, self.space)
                ]
            else:
                trained = role in self.problem.trained
                make = training_strategies if trained else frozen_strategies
                space = self._space(self.nodes_of(unit))
                ways = [
                    sum(resting_bytes(model, one, trained=trained).values())
                    for one in make(model, gpus, node_gpus, space)
                ]
            self._least_rests[key] = min(ways, default=self.usable + 1)
        return self._least_rests[key]

    def floor(self, unit: str, fewest: int, most: int) -> dict[str, float]:
        """Node -> seconds it takes at least on any number of GPUs in a range, without looking at any strategy."""
        load, found = self.problem.workload, dict[str, float]()
        pipeline = max(self._space(self.nodes_of(unit)).pipeline) > 1
        for work in self.nodes_of(unit):
            model = self.problem.models[work.role]
            if work.phase == "generate":
                found[work.name] = generation_floor_s(model, work, load, most, self.machine)
            elif work.phase in ("train", "infer"):
                found[work.name] = floor_s(model, work, load, (fewest, most), self.machine, pipeline=pipeline)
            else:
                found[work.name] = 0.0
        return found

    def generation(self, work: NodeWork, generation: Generation, budget: float) -> NodeCost | None:
        """Cost of a node that generates, given bytes per GPU."""
        key = (work.name, generation, budget)
        if key not in self._generated:
            model = self.problem.models[work.role]
            self._generated[key] = generation_cost(model, work, self.problem.workload, generation, self.machine, budget)
        return self._generated[key]

    def least_holdings(self, unit: str, gpus: int) -> tuple[Holding, ...]:
        """All holdings of a unit, those included that rest in more memory than there is: to say what is missing."""
        role, _, half = unit.partition(".")
        return () if half else tuple(self._holdings(role, gpus, self.nodes_of(unit), (), any_size=True))

    # --- one unit ----------------------------------------------------------------------------------------
    def _make(self, unit: str, gpus: int) -> Candidates:
        role, _, half = unit.partition(".")
        model, nodes = self.problem.models[role], self.nodes_of(unit)
        generating = [work for work in nodes if work.phase == "generate"]
        generations = tuple(self._generations(model, gpus, generating)) if generating else ()
        graphs = self.machine.efficiency.graphs_bytes
        if half:
            rest = min((generation_weights(model, one) + graphs for one in generations), default=self.usable + 1)
            best = self._best_generation(generating, generations, self.usable - graphs)
            return Candidates((), generations, rest, best)
        holdings = undominated(self._holdings(role, gpus, nodes, generations))
        least = min((holding.rest for holding in holdings), default=self.usable + 1)
        best = dict[str, float]()
        for holding in holdings:
            for name, variants in holding.variants.items():
                cost = cheapest(variants, self.usable - holding.rest)
                if cost is not None:
                    best[name] = min(best.get(name, cost.seconds), cost.seconds)
            for work in nodes:
                if work.phase == "reshard" and holding.reshard:
                    best[work.name] = min(best.get(work.name, holding.reshard[0]), *holding.reshard)
        best |= self._best_generation(generating, generations, self.usable - least)
        return Candidates(holdings, generations, least, best)

    def _best_generation(
        self, nodes: list[NodeWork], generations: tuple[Generation, ...], budget: float
    ) -> dict[str, float]:
        best: dict[str, float] = {}
        for work in nodes:
            costs = [cost for one in generations if (cost := self.generation(work, one, budget)) is not None]
            if costs:
                best[work.name] = min(cost.seconds for cost in costs)
        return best

    def _holdings(
        self,
        role: str,
        gpus: int,
        nodes: tuple[NodeWork, ...],
        generations: tuple[Generation, ...],
        any_size: bool = False,
    ) -> Iterator[Holding]:
        model, trained = self.problem.models[role], role in self.problem.trained
        node_gpus = self.machine.cluster.gpus_per_node
        space = self._space(nodes)
        make = training_strategies if trained else frozen_strategies
        training = [work for work in nodes if work.phase == "train"]
        for strategy in make(model, gpus, node_gpus, space):
            if not all(self._allowed(work, strategy) for work in (training or nodes) if work.phase != "generate"):
                continue
            rest = sum(resting_bytes(model, strategy, trained=trained).values())
            rest += self.machine.efficiency.graphs_bytes if any(work.phase == "generate" for work in nodes) else 0.0
            host = host_bytes(model, strategy, trained=trained)
            if (rest > self.usable or host > self.usable_host) and not any_size:
                continue
            variants = {work.name: self._variants(work, strategy, trained) for work in nodes if _computes(work)}
            syncs = any(work.phase == "reshard" for work in nodes)
            reshard = tuple(total_reshard_s(model, strategy, one, self.machine) for one in generations if syncs)
            yield Holding(strategy, rest, variants, host, reshard)

    def _variants(self, work: NodeWork, strategy: Strategy, trained: bool) -> Variants:
        model, load = self.problem.models[work.role], self.problem.workload
        if work.phase == "train":
            found = training_variants(model, work, load, strategy, self.machine)
            recompute = self.wanted.get(work.name, {}).get("recompute")
            if recompute is None:
                return found
            return training_variants(model, work, load, strategy, self.machine, recompute=bool(recompute))
        own: Variants = ()
        if not trained or self._allowed(work, strategy):
            own = inference_variants(model, work, load, strategy, self.machine, trained=trained)
        return staircase([*own, *self._elsewhere(work, strategy, own)]) if trained and self.space.reallocate else own

    def _elsewhere(self, work: NodeWork, strategy: Strategy, own: Variants) -> Iterator[tuple[float, NodeCost]]:
        """Inference of a trained role under a holding of its own: its weights are copied over first (ReaL's view)."""
        model = self.problem.models[work.role]
        for other, weights, variants in self._full_copies(work, strategy.gpus):
            target = Generation(gpus=other.gpus, tp=other.tp)
            copy_s = total_reshard_s(model, strategy, target, self.machine)
            for need, cost in variants:
                mine = cheapest(own, need + weights)
                if mine is not None and mine.seconds <= cost.seconds + copy_s:
                    continue
                yield (
                    need + weights,
                    cost._replace(
                        seconds=cost.seconds + copy_s,
                        part_names=(*cost.part_names, "reallocate"),
                        part_seconds=(*cost.part_seconds, copy_s),
                        memory_bytes=(*cost.memory_bytes[:-1], weights),
                        holding=other,
                    ),
                )

    def _full_copies(self, work: NodeWork, gpus: int) -> list[tuple[Strategy, float, Variants]]:
        """Holdings with a full copy on every rank, the copy's bytes per GPU, and ways to run a node under them."""
        key = (work.name, gpus)
        if key not in self._copies:
            model, load = self.problem.models[work.role], self.problem.workload
            self._copies[key] = [
                (
                    other,
                    WEIGHT_BYTES * model.parameters / other.tp,
                    inference_variants(model, work, load, other, self.machine, trained=False),
                )
                for other in frozen_strategies(model, gpus, self.machine.cluster.gpus_per_node, FULL_COPIES)
                if self._allowed(work, other)
            ]
        return self._copies[key]

    def _generations(self, model: ModelSpec, gpus: int, nodes: list[NodeWork]) -> Iterator[Generation]:
        for one in generation_strategies(model, gpus, self.machine.cluster.gpus_per_node, self.space):
            if all(_fits(self.wanted.get(work.name, {}), tp=one.tp, pp=one.pp, dp=one.replicas) for work in nodes):
                yield one

    def _allowed(self, work: NodeWork, strategy: Strategy) -> bool:
        wanted = dict(self.wanted.get(work.name, {}))
        if strategy.dp * strategy.sp == 1:  # Nothing to shard over: all stages are the same.
            wanted.pop("zero", None)
        elif work.role not in self.problem.trained and wanted.get("zero") in (1, 2):
            wanted["zero"] = 0  # Stages 1 and 2 shard what a frozen role does not have.
        return _fits(
            wanted,
            tp=strategy.tp,
            sp=strategy.sp,
            pp=strategy.pp,
            dp=strategy.dp,
            zero=strategy.zero,
            offload=strategy.offload,
        )

    def _space(self, nodes: tuple[NodeWork, ...]) -> Space:
        asked = {
            int(given["pp"]) for work in nodes if _computes(work) and "pp" in (given := self.wanted.get(work.name, {}))
        }
        space = replace(self.space, pipeline=tuple(sorted(asked))) if asked else self.space
        shared = any(self.wanted.get(work.name, {}).get("sp", 1) > 1 for work in nodes)
        return replace(space, frozen_sequence=True) if shared else space


def _computes(work: NodeWork) -> bool:
    return work.phase in ("train", "infer")


def _fits(wanted: Mapping[str, Any], **fields: Any) -> bool:
    return all(fields[name] == value for name, value in wanted.items() if name in fields)
