"""Which nodes take the rows of another piece by piece (`placement.pieces`), while that is still at it."""

from __future__ import annotations

from rlhf_dist.dataflow.graph import Node

HANDING = ("generate_sequences", "run_episodes")
"""Ops whose ranks hand over what is finished."""


def hands_over(source: Node) -> bool:
    """Whether rows of this node are there before it is done. Those of the first `groups=` are known when all are."""
    return source.op in HANDING and source.kwargs.get("groups") is None


def takes_pieces(source: Node, target: Node) -> bool:
    """Whether `target` may be given the rows of `source` piece by piece: each row's result is its own, and
    all that it reads was made there."""
    return (
        hands_over(source)
        and target.kind == "op"
        and target.rows == "keep"
        and not target.weights_written
        and getattr(target.spec, "streams", False)
        and len(target.inputs) == 1
        and target.inputs[0].rows == source.name
        and not target.inputs[0].ids  # ids are made when all rows are there
        and all(origin.node == source.name for origin in target.inputs[0].columns.values())
    )
