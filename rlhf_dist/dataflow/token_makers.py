"""Whose tokens a column holds: token ids mean words only to the tokenizer that made them.

source prompts   prompt_ids          the sources' tokenizer
actor.generate   response_ids        actor's
join, concat, drop, rename ...       those of the column that came in
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rlhf_dist.dataflow.graph import ColumnOrigin, Dataflow, Input, Node
from rlhf_dist.schema import SEQUENCE


def makers(nodes: Mapping[str, Node], origin: ColumnOrigin) -> frozenset[str]:
    """Roles and sources that made the token ids of a column; none for a column of something else.

    Several where batches were put together. What a host op or a state writes is of those whose tokens it reads.
    """
    found: set[str] = set()
    seen: set[ColumnOrigin] = set()
    left = [origin]
    while left:
        at = left.pop()
        if at in seen:
            continue
        seen.add(at)
        node, own = nodes[at.node], _own_name(nodes[at.node], at.column)
        if at.column not in node.writes:
            left += [one for entry in node.inputs for one in _under(entry, at.column)]
        elif node.kind == "join":
            left.append(node.inputs[1].columns[own])
        elif node.kind in ("op", "source"):
            found |= {node.role} if own in SEQUENCE else set()
        elif own in SEQUENCE:
            reading = [node, *(one for one in nodes.values() if node.kind == "state" and one.role == node.role)]
            left += [one for reader in reading for entry in reader.inputs for one in _token_columns(entry)]
    return frozenset(found)


def reads_others_tokens(dataflow: Dataflow, role: str) -> bool:
    """Whether some op of `role` is given token ids that others made: it must have their vocabulary.

    A judge that is asked by templates alone is not.
    """
    nodes = {node.name: node for node in dataflow}
    given = (
        origin
        for node in dataflow
        if node.role == role and node.kind == "op"
        for entry in node.inputs
        for name, origin in entry.columns.items()
        if name not in node.kwargs.get("decode", ())
    )
    return any(makers(nodes, origin) - {role} for origin in given)


def _own_name(node: Node, column: str) -> str:
    return next((own for own, new in node.out.items() if new == column), column)


def _under(entry: Input, column: str) -> Iterable[ColumnOrigin]:
    return [kept[column] for kept in (entry.columns, entry.carried) if column in kept]


def _token_columns(entry: Input) -> Iterable[ColumnOrigin]:
    return [origin for name, origin in {**entry.carried, **entry.columns}.items() if name in SEQUENCE]
