"""Graph passes: Dataflow in, Dataflow out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlhf_dist.dataflow.graph import ColumnOrigin, Dataflow, Input, Node
from rlhf_dist.schema import COLUMNS


def insert_reshard(dataflow: Dataflow) -> Dataflow:
    """Add the nodes that move a role's weights from its training layout to its generation layout.

    `actor.train` and `actor.rollout` are two weight states. Generation reads what the last write before it left,
    in the recipe's order and around the loop: between an update (or another write) and the generation that follows it
    stands a `reshard`, right after the last write. Where that generation is the next step's, the edge is loop-carried.
    """
    nodes = list(dataflow.nodes)
    for role in dataflow.roles:
        due = _syncs_due(nodes, role)
        for number, (position, writers) in reversed(list(enumerate(due, start=1))):
            nodes.insert(position + 1, reshard_node(role, number, writers))
    return replace(dataflow, nodes=tuple(nodes))


def _syncs_due(nodes: list[Node], role: str) -> list[tuple[int, list[Node]]]:
    """Where weights are that `role` generates with: position of the last writer, and all since the generation before;
    none for a role that does not generate."""
    train, rollout = f"{role}.train", f"{role}.rollout"
    if not any(rollout in node.weights_read for node in nodes):
        return []
    due, position, writers = list[tuple[int, list[Node]]](), 0, list[Node]()
    for at, node in enumerate(nodes):
        if rollout in node.weights_read and writers:
            due.append((position, writers))
            writers = []
        if train in node.weights_written:
            position, writers = at, [*writers, node]
    return [*due, (position, writers)] if writers else due


def reshard_node(role: str, number: int = 1, writers: Sequence[Node] = ()) -> Node:
    """The node that reads `role`.train and writes `role`.rollout, for the `number`th time in a step.

    writers: whose weights it moves. It keeps their cadence where all are copies and the like with one cadence; after
    an update it runs every step, since generation counts the steps that its weights have seen.
    """
    cadences = {(node.every, node.after) for node in writers}
    follows = len(cadences) == 1 and all(node.kind == "weights" for node in writers)
    every, after = cadences.pop() if follows else (1, 0)
    return Node(
        name=f"{role}.reshard" if number == 1 else f"{role}.reshard#{number}",
        role=role,
        op="reshard",
        kind="reshard",
        weights_read=(f"{role}.train",),
        weights_written=(f"{role}.rollout",),
        every=every,
        after=after,
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
