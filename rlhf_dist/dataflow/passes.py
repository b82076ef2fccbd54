"""Graph passes: Dataflow in, Dataflow out."""

from __future__ import annotations

from dataclasses import replace

from rlhf_dist.dataflow.graph import ColumnOrigin, Dataflow, Input, Node
from rlhf_dist.schema import COLUMNS


def insert_reshard(dataflow: Dataflow) -> Dataflow:
    """Add the nodes that move a role's weights from its training layout to its generation layout.

    `actor.train` and `actor.rollout` are two weight states. Generation reads what the last update before it wrote,
    in the recipe's order and around the loop: between an update and the generation that follows it stands a
    `reshard`, right after the last update. Where that generation is the next step's, the edge is loop-carried.
    """
    nodes = list(dataflow.nodes)
    for role in dataflow.roles:
        due = _syncs_due(nodes, role)
        for number, position in reversed(list(enumerate(due, start=1))):
            nodes.insert(position + 1, reshard_node(role, number))
    return replace(dataflow, nodes=tuple(nodes))


def _syncs_due(nodes: list[Node], role: str) -> list[int]:
    """Positions of the updates whose weights `role` generates with; none for a role that does not generate."""
    train, rollout = f"{role}.train", f"{role}.rollout"
    if not any(rollout in node.weights_read for node in nodes):
        return []
    due, written = list[int](), None
    for position, node in enumerate(nodes):
        if rollout in node.weights_read and written is not None:
            due.append(written)
            written = None
        if train in node.weights_written:
            written = position
    return due if written is None else [*due, written]


def reshard_node(role: str, number: int = 1) -> Node:
    """The node that reads `role`.train and writes `role`.rollout, for the `number`th time in a step."""
    return Node(
        name=f"{role}.reshard" if number == 1 else f"{role}.reshard#{number}",
        role=role,
        op="reshard",
        kind="reshard",
        weights_read=(f"{role}.train",),
        weights_written=(f"{role}.rollout",),
    )


def insert_rollout_dump(dataflow: Dataflow, *, folder: str, rows: int, every: int) -> Dataflow:
    """Add the node that writes sampled rollouts to Parquet: of the first generation the text, every
    per-row column, and which weights drew each token.

    The source role writes the file; graphs without generation are returned as they are.
    """
    maker = next((node for node in dataflow if node.rows == "expand"), None)
    source = next((node for node in dataflow if node.kind == "source"), None)
    if maker is None or source is None or not every:
        return dataflow
    made = (*maker.writes, *(name for batch in maker.inputs for name in (*batch.columns, *batch.carried)))
    columns = {name: ColumnOrigin(maker.name, name) for name in made if _dumped(name)}
    for node in dataflow:
        if node.rows == "keep" and node.inputs and node.inputs[0].rows == maker.name:
            columns |= {name: ColumnOrigin(node.name, name) for name in node.writes if _dumped(name)}
    dump = Node(
        name=f"{source.name}.dump",
        role=source.name,
        op="dump",
        kind="op",
        inputs=(Input(rows=maker.name, columns=columns),),
        kwargs={"folder": folder, "rows": rows},
        every=every,
    )
    return replace(dataflow, nodes=(*dataflow.nodes, dump))


def _dumped(name: str) -> bool:
    return name not in COLUMNS or COLUMNS[name].shape == "[B]" or name == "policy_version"
