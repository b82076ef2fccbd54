"""A graph pass: what is evaluated as nodes of the step, for a role that generates in a pool of its own.

    actor.generate_sequences ─> actor.compute_log_prob ─> actor.update_actor ─> actor.reshard     the step, pool train
               │                                                                    ^
               └> heldout/prompts ─> heldout/actor.generate_sequences ──────────────┘             in pool gen meanwhile
                                       reads actor.rollout, the weights that the step began with

Nobody has to wait but who writes those weights: the edges of any weight state say so. The evaluation comes behind the
step's own generation, so that it takes time of its pool that nothing else needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import lcm

from rlhf_dist.dataflow.evaluation_graph import EvaluationGraph
from rlhf_dist.dataflow.graph import ColumnOrigin, Dataflow, Input, Node


def with_evaluations(dataflow: Dataflow, evaluations: Sequence[EvaluationGraph], held_out: str) -> Dataflow:
    """The step's graph with these beside it, each at its cadence. held_out: the source that has the rows.

    See `draws_with_them` for what a step must have.
    """
    nodes = list(dataflow.nodes)
    for one in evaluations:
        drawing = draws_with_them(nodes, one)
        at = max(drawing, default=-1)
        beside = [_node(node, one, held_out, len(nodes)) for node in one.dataflow]
        if drawing:
            gate = Input(rows=nodes[at].name, columns={})
            beside = [replace(node, inputs=(gate,)) if node.kind == "source" else node for node in beside]
        nodes[at + 1 : at + 1] = beside
    roles = {**dataflow.roles, **({held_out: "Prompts"} if evaluations else {})}
    return replace(dataflow, nodes=tuple(nodes), roles=roles)


def draws_with_them(nodes: Sequence[Node], one: EvaluationGraph) -> list[int]:
    """Which of a step's nodes draw with weights that the evaluation draws with, before any of these change: the
    evaluation comes behind them, before what scores it changes, and is of the weights that the step began with."""
    read = {state for node in one.dataflow for state in node.weights_read}
    drawn = {state for state in read if state.endswith(".rollout")}
    written = next((at for at, node in enumerate(nodes) if read & set(node.weights_written)), len(nodes))
    return [at for at, node in enumerate(nodes[:written]) if drawn & set(node.weights_read)]


def _node(node: Node, one: EvaluationGraph, held_out: str, first: int) -> Node:
    def named(name: str) -> str:
        return f"{one.name}/{name}"

    def origins(columns: dict[str, ColumnOrigin]) -> dict[str, ColumnOrigin]:
        return {name: replace(at, node=named(at.node)) for name, at in columns.items()}

    inputs = tuple(
        replace(
            batch, rows=named(batch.rows), columns=origins(dict(batch.columns)), carried=origins(dict(batch.carried))
        )
        for batch in node.inputs
    )
    return replace(
        node,
        name=named(node.name),
        role=held_out if node.role == one.source else node.role,
        inputs=inputs,
        every=lcm(node.every, one.every),
        place=first + node.place,
        evaluation=one.name,
    )
