"""The dataflow graph: frozen nodes and edges, one edge per column or weight state.

    prompts --prompt_ids--> actor.generate_sequences --response_ids--> critic.compute_values --values--> gae
                                 ^                                                                        |
                                 |  weights actor.rollout, distance 1                  advantages         v
                                 +------------------------- reshard <--weights actor.train-- actor.update_actor

A node belongs to a step; an edge with distance d runs from the source's step t to the target's step
t + d. A node's inputs name, for every column an op reads, which node wrote it and under which name,
and which node made the rows. Nodes that make rows (a source, generation, a filter) own all columns of
those rows: columns they only carry along move by index, not by value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from rlhf_dist.dataflow.facts import RoleFacts, facts_of
from rlhf_dist.roles import RowEffect

Kind = Literal["source", "op", "host", "state", "join", "concat", "refill", "reshard", "weights"]


class GraphError(ValueError):
    """A recipe that cannot run, found before anything starts."""


@dataclass(frozen=True)
class ColumnOrigin:
    """Column `column` as node `node` wrote or carried it."""

    node: str
    column: str


@dataclass(frozen=True, kw_only=True)
class Input:
    """One batch that a node reads."""

    rows: str
    """The node that made the rows."""
    columns: Mapping[str, ColumnOrigin]
    """Column as the op sees it -> where it comes from."""
    carried: Mapping[str, ColumnOrigin] = field(default_factory=dict)
    """Columns not read but carried along by a node that makes new rows."""
    ids: tuple[str, ...] = ()
    """What the controller knows of each row and the op reads, of `schema.ROW_IDS`."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operation of a step."""

    name: str
    """Unique in its graph: `critic.compute_values`, `gae`, `actor.generate_sequences#2`."""
    role: str
    """Role that runs it; `host` for host ops, `controller` for what moves row indices only."""
    op: str
    kind: Kind
    inputs: tuple[Input, ...] = ()
    writes: tuple[str, ...] = ()
    """Columns it writes, under the recipe's names."""
    out: Mapping[str, str] = field(default_factory=dict)
    """The op's own column name -> the recipe's, where they differ."""
    rows: RowEffect = "keep"
    weights_read: tuple[str, ...] = ()
    weights_written: tuple[str, ...] = ()
    """Weight states, e.g. `actor.train`, `actor.rollout`, `actor.anchor` (a named set), `multiplier.state`."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    spec: Any = None
    """OpSpec or HostOp behind it."""
    line: str = ""
    """Where in the recipe, `ppo.py:31`."""
    every: int = 1
    """Cadence: the node runs at steps divisible by it."""
    after: int = 0
    """Cadence: the node runs from this step on (critic warm-up)."""
    place: int = 0
    """Its place in the recipe: which node made a row is part of the row's id."""
    evaluation: str = ""
    """The `EvaluationGraph` that it belongs to, where that stands beside the step (`beside.py`); empty: the step's."""

    def runs_at(self, step: int) -> bool:
        """Whether the node runs at `step`; a node that does not counts as done."""
        return step >= self.after and step % self.every == 0

    @property
    def senders(self) -> tuple[str, ...]:
        """Other roles whose weights a node of kind `weights` takes."""
        read = (state.removesuffix(".train") for state in self.weights_read if state.endswith(".train"))
        return tuple(role for role in read if role != self.role) if self.kind == "weights" else ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns it reads, as the op sees them."""
        return tuple(dict.fromkeys(name for batch in self.inputs for name in batch.columns))


@dataclass(frozen=True, kw_only=True)
class Edge:
    """`target` at step t + distance waits for `source` at step t. Exactly one of column, weights is set."""

    source: str
    target: str
    column: str | None = None
    weights: str | None = None
    distance: int = 0
    reason: Literal["data", "write-then-read", "read-then-write", "write-then-write"] = "data"


@dataclass(frozen=True, kw_only=True)
class Dataflow:
    """A recipe as a graph. Nodes are in the recipe's order, which is a topological order of distance-0 edges."""

    name: str
    nodes: tuple[Node, ...]
    roles: Mapping[str, str]
    """Role -> the name of its interface, in the recipe's order."""
    bases: Mapping[str, str] = field(default_factory=dict)
    """Role -> the name of the base that its interface derives from (`roles.BASES`); sources and states have none."""
    staleness: int = 0
    """Updates that the weights which generate may be behind: generation of step t waits for the reshard of step
    t - 1 - staleness. It never is behind what its own step trained before it."""
    beside: tuple[Node, ...] = ()
    """Nodes of the recipe's own evaluation, which is no part of a step: they ask for roles, too."""

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(f"no node {name!r} in {self.name}; it has {', '.join(node.name for node in self.nodes)}")

    def source_of(self, rows: str) -> str | None:
        """The source parameter whose rows, or rows made of them, node `rows` has; None where it has none, and the first
        of several."""
        node = self[rows]
        while node.inputs and node.kind != "source":
            node = self[node.inputs[0].rows]
        return node.role if node.kind == "source" else None

    @property
    def refilled(self) -> tuple[str, ...]:
        """Sources that are drawn from as often as a step needs; the controller counts how far."""
        return tuple(
            node.name for node in self.nodes if node.kind == "source" and node.weights_written and not node.inputs
        )

    @property
    def edges(self) -> tuple[Edge, ...]:
        """All edges: columns in node order, then weight states."""
        columns = [
            Edge(source=origin.node, target=node.name, column=origin.column)
            for node in self.nodes
            for batch in node.inputs
            for origin in dict.fromkeys(batch.columns.values())
        ]
        return (*columns, *_weight_edges(self.nodes, self.staleness))

    @property
    def waits(self) -> frozenset[tuple[str, str, int]]:
        """(source, target, distance) of all that a node waits for: its edges, who made its rows, and who wrote what it
        carries along for others."""
        needed = self.column_readers
        rows = {(batch.rows, node.name, 0) for node in self.nodes for batch in node.inputs}
        carried = {
            (origin.node, node.name, 0)
            for node in self.nodes
            for batch in node.inputs
            for name, origin in batch.carried.items()
            if needed[node.name].get(name)
        }
        return frozenset({(edge.source, edge.target, edge.distance) for edge in self.edges} | rows | carried)

    @property
    def column_readers(self) -> dict[str, dict[str, set[str]]]:
        """Node -> column -> nodes that read it, or carry it for one that does."""
        readers: dict[str, dict[str, set[str]]] = {node.name: {} for node in self.nodes}
        # Backwards, since a column carried along for nobody is not read.
        for node in reversed(self.nodes):
            for batch in node.inputs:
                wanted = [
                    *batch.columns.values(),
                    *(origin for name, origin in batch.carried.items() if readers[node.name].get(name)),
                ]
                for origin in wanted:
                    readers[origin.node].setdefault(origin.column, set()).add(node.name)
        return readers

    @property
    def used_roles(self) -> set[str]:
        """Roles that some node runs on or whose state it reads: the others need no process."""
        nodes = (*self.nodes, *(node for node in self.beside if node.kind == "op"))
        states = {state.split(".")[0] for node in nodes for state in node.weights_read}
        return {node.role for node in nodes} | states

    def predecessors(self, name: str) -> set[str]:
        """Nodes whose columns `name` reads, in the same step."""
        return {edge.source for edge in self.edges if edge.target == name and edge.column}

    @cached_property
    def facts(self) -> Mapping[str, RoleFacts]:
        """What is asked of each role, in the recipe's order."""
        return facts_of((*self.nodes, *self.beside), self.roles)

    @property
    def generating(self) -> tuple[str, ...]:
        """Roles that generate, in the recipe's order."""
        return tuple(role for role, facts in self.facts.items() if facts.generates)

    @property
    def trained(self) -> tuple[str, ...]:
        """Roles that learn, in the recipe's order."""
        return tuple(role for role, facts in self.facts.items() if facts.trained)

    @property
    def written(self) -> tuple[str, ...]:
        """Roles whose weights a node of kind `weights` writes, in the recipe's order."""
        rewritten = {n.role for n in self if n.kind == "weights" and f"{n.role}.train" in n.weights_written}
        return tuple(role for role in self.roles if role in rewritten)

    @property
    def ways(self) -> dict[tuple[str, str], int]:
        """(role, role that takes its weights) -> copies of its own weights that the taker needs beside them."""
        staged = {"copy_from": 0, "mix_from": 1, "merge_from": 2}
        found: dict[tuple[str, str], int] = {}
        for node in self:
            for sender in node.senders:
                way = (sender, node.role)
                found[way] = max(found.get(way, 0), staged[node.op])
        return found

    def readers(self, name: str) -> set[str]:
        """Nodes that need anything `name` wrote or carried, in the same step."""
        return {
            node.name
            for node in self.nodes
            for batch in node.inputs
            if any(origin.node == name for origin in (*batch.columns.values(), *batch.carried.values()))
            or batch.rows == name
        }


def _weight_edges(nodes: Iterable[Node], staleness: int) -> list[Edge]:
    """Read-after-write, write-after-read and write-after-write order of every weight state, around the step."""
    effects: dict[str, list[tuple[str, bool]]] = {}
    for node in nodes:
        for state in dict.fromkeys((*node.weights_read, *node.weights_written)):
            effects.setdefault(state, []).append((node.name, state in node.weights_written))
    edges: list[Edge] = []
    for state, sequence in effects.items():
        if not any(writes for _, writes in sequence):
            continue
        for position, (name, writes) in enumerate(sequence):
            # Look back around the loop for the last write before this node.
            for back in range(1, len(sequence) + 1):
                other, other_writes = sequence[position - back]
                if other_writes:
                    reason: Any = "write-then-write" if writes else "write-then-read"
                    distance = int(back > position)
                    if distance and reason == "write-then-read" and state.endswith(".rollout"):
                        distance += staleness  # what the same step wrote is always waited for
                    edges.append(Edge(source=other, target=name, weights=state, distance=distance, reason=reason))
                    break
            if not writes:
                for ahead in range(1, len(sequence) + 1):
                    wrapped, index = divmod(position + ahead, len(sequence))
                    other, other_writes = sequence[index]
                    if other_writes:
                        edges.append(
                            Edge(source=name, target=other, weights=state, distance=wrapped, reason="read-then-write")
                        )
                        break
    return edges
