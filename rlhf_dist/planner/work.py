"""What every node of a traced graph computes: which model, on how many rows, in how many updates.

Any recipe works: nothing here knows PPO. A node that makes several rows of each and reads `ROLE.rollout`
generates; one that writes weights trains; one of a role with a model that does neither is inference; the
rest runs on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rlhf_dist.dataflow.graph import Dataflow, Node
from rlhf_dist.dataflow.row_facts import amounts
from rlhf_dist.model_specs import ModelSpec
from rlhf_dist.planner.workload import Workload
from rlhf_dist.typed import ConfigError, unknown

Phase = Literal["train", "infer", "generate", "reshard", "host"]
VALUE_BASES = ("ValueModel", "Reward")
"""Kinds of role with one output instead of a vocabulary."""
RULES = ("rule", "none", "function")


@dataclass(frozen=True, kw_only=True)
class NodeWork:
    """One node of a step."""

    name: str
    phase: Phase
    role: str
    """Role whose model it runs; empty for host work."""
    rows: int
    prompts: int
    """Prompts behind the rows: a prompt is prefilled once for all its samples."""
    mini_batches: int = 1
    epochs: int = 1
    every: int = 1
    """It runs once in so many steps."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question to the planner, less the cluster: what is to be done and in which order."""

    dataflow: Dataflow
    models: Mapping[str, ModelSpec]
    """Role -> shape, for roles that run a model, in the recipe's order."""
    workload: Workload
    nodes: tuple[NodeWork, ...]
    """In the graph's order."""

    @property
    def staleness(self) -> int:
        """Updates that the weights which generate may be behind."""
        return self.dataflow.staleness

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles to be placed."""
        return tuple(self.models)

    @property
    def trained(self) -> frozenset[str]:
        """Roles that learn."""
        return frozenset(work.role for work in self.nodes if work.phase == "train")

    @property
    def generating(self) -> frozenset[str]:
        """Roles that generate."""
        return frozenset(work.role for work in self.nodes if work.phase == "generate")

    @property
    def rows(self) -> int:
        """Rows of a step: of the node that has most (two for each preference)."""
        return max(work.rows for work in self.nodes)

    @property
    def tokens(self) -> float:
        """Prompt and response tokens of a step."""
        return self.rows * self.workload.row_tokens

    def edges(self) -> tuple[tuple[str, str, int], ...]:
        """(source, target, distance) of everything a node waits for."""
        return tuple(sorted(self.dataflow.waits))


def make_problem(
    dataflow: Dataflow,
    models: Mapping[str, ModelSpec | None],
    workload: Workload,
    *,
    cuts_of_graph: bool = False,
) -> Problem:
    """The work of every node. `models`: role -> shape, None for a role that is a rule on the host.

    cuts_of_graph: mini-batches and epochs are those of each node's call, not those of the workload.

    Raises ConfigError for a role without an entry, or one that generates or learns without a model.
    """
    used = [role for role in dataflow.roles if role in dataflow.used_roles]
    sources = {node.role for node in dataflow if node.kind == "source"}
    states = {name for name in dataflow.roles if any(f"{name}.state" in node.weights_read for node in dataflow)}
    placed = [role for role in used if role not in sources | states]
    for role in models:
        if role not in dataflow.roles:
            raise ConfigError(f"models: {unknown(role, placed, 'role')}")
    for role in placed:
        if role not in models:
            raise ConfigError(f"models.{role} has no value and needs one; set it to a model, or to `rule` for a reward")
    shapes: dict[str, ModelSpec] = {}
    for role in placed:
        shape = models[role]
        if shape is not None:
            shapes[role] = replace(shape, scalar_head=dataflow.bases.get(role) in VALUE_BASES)
    nodes = _nodes(dataflow, shapes, workload, cuts_of_graph)
    for work in nodes:
        if work.phase == "host":
            node = dataflow[work.name]
            needs_model = node.kind not in ("weights", "reshard") or node.role not in shapes
            if node.role in placed and needs_model and (node.weights_read or node.weights_written):
                raise ConfigError(f"models.{node.role}: {work.name} runs a model, so it cannot be a rule; give one")
    return Problem(dataflow=dataflow, models=shapes, workload=workload, nodes=nodes)


def _nodes(
    dataflow: Dataflow, models: Mapping[str, ModelSpec], workload: Workload, cuts_of_graph: bool
) -> tuple[NodeWork, ...]:
    sources = {node.role for node in dataflow if node.kind == "source"}
    rows = {name: one.rows for name, one in amounts(dataflow, dict.fromkeys(sources, workload.prompts)).items()}
    prompts: dict[str, int] = {}
    found: list[NodeWork] = []
    asked = {node.role for node in dataflow if node.kind == "op" and node.rows == "expand"}
    for node in dataflow:
        before = [batch.rows for batch in node.inputs]
        if node.rows in ("new", "expand"):
            prompts[node.name] = sum(rows[name] for name in before) if node.rows == "expand" else rows[node.name]
        else:
            prompts[node.name] = sum(prompts[name] for name in (before if node.kind == "concat" else before[:1]))
        # A copy beside steps of minutes, or a sync to who speaks in another's episodes: their time is not modelled.
        free = node.kind == "weights" or node.kind == "reshard" and node.role not in asked
        found.append(
            NodeWork(
                name=node.name,
                phase="host" if free else _phase(node, models),
                role=node.role if node.role in models and not free else "",
                rows=rows[node.name],
                prompts=prompts[node.name],
                mini_batches=_cut(node, "mini_batches", workload.mini_batches, cuts_of_graph),
                epochs=_cut(node, "epochs", workload.epochs, cuts_of_graph),
                every=node.every,
            )
        )
    return tuple(found)


def _cut(node: Node, name: str, asked: int, of_graph: bool) -> int:
    if name not in node.kwargs:
        return 1
    return int(node.kwargs[name]) if of_graph else asked


def _phase(node: Node, models: Mapping[str, ModelSpec]) -> Phase:
    if node.role not in models:
        return "host"
    if node.kind == "reshard":
        return "reshard"
    if any(state.endswith(".train") for state in node.weights_written):
        return "train"
    if any(state.endswith(".rollout") for state in node.weights_read):
        return "generate"
    return "infer" if node.kind == "op" else "host"
