"""What finished nodes left, by reference: a node's inputs are put together from it, and read columns are let go.

    (generate, 7)  rows: group, tokens     columns: response_ids -> readers {critic, actor, reward}
                                                    finished     -> readers {}            dropped at once

A column is dropped when its last reader is done; the object store can then free it. Rows (two numbers
each) stay until the step ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from controller.batch_ref import BatchRef, RowTable, StoredColumn
from rlhf_dist.batch import IntArray
from rlhf_dist.dataflow.graph import ColumnOrigin, Dataflow, Input, Node
from rlhf_dist.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class NodeOutput:
    """What a finished node left: its batch, its metrics, its time."""

    batch: BatchRef | None
    metrics: Metrics
    seconds: float
    """Of the slowest rank."""
    nbytes: int
    """Bytes stored."""
    state: Mapping[str, float] | None = None
    places: tuple[IntArray, ...] = ()
    """For each answering rank: where its rows are in the batch."""


class JoinError(ValueError):
    """Rows of a join that do not match."""


@dataclass
class _Kept:
    rows: RowTable
    columns: dict[str, StoredColumn]
    readers: dict[str, set[str]] = field(default_factory=dict)
    """Column -> nodes that will still read or carry it; empty where readers are not known."""


class Outputs:
    """Batches of the steps under way. `dataflow` None: who reads what is not known, all is kept."""

    def __init__(self, dataflow: Dataflow | None) -> None:
        self._readers: dict[str, dict[str, set[str]]] | None = None if dataflow is None else _readers(dataflow)
        self._kept: dict[tuple[str, int], _Kept] = {}

    def put(self, node: str, step: int, batch: BatchRef) -> None:
        """Keep what somebody will read of `batch`."""
        readers = {} if self._readers is None else {c: set(r) for c, r in self._readers.get(node, {}).items()}
        columns = {c: at for c, at in batch.columns.items() if self._readers is None or c in readers}
        self._kept[node, step] = _Kept(batch.rows, columns, readers)

    def batch(self, node: str, step: int) -> BatchRef:
        """What is left of a node's batch."""
        kept = self._kept[node, step]
        return BatchRef(kept.rows, kept.columns)

    def input(self, entry: Input, step: int) -> BatchRef:
        """A node's input with everything it reads, and what it carries for others."""
        carried = {
            name: column
            for name, at in entry.carried.items()
            if (column := self._kept[at.node, step].columns.get(at.column))
        }
        read = {name: self._kept[at.node, step].columns[at.column] for name, at in entry.columns.items()}
        return BatchRef(self._kept[entry.rows, step].rows, {**carried, **read})

    def done(self, node: Node, step: int) -> None:
        """`node` has read its inputs: drop the columns that nobody else will read."""
        for entry in node.inputs:
            for origin in {*entry.columns.values(), *entry.carried.values()}:
                kept = self._kept.get((origin.node, step))
                if kept is None or origin.column not in kept.readers:
                    continue
                kept.readers[origin.column].discard(node.name)
                if not kept.readers[origin.column]:
                    kept.columns.pop(origin.column, None)

    def end_step(self, step: int) -> None:
        """Drop what is left of a step."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[1] > step}

    def columns_kept(self, step: int) -> int:
        """Columns of `step` that are still referenced."""
        return sum(len(kept.columns) for (_, at), kept in self._kept.items() if at == step)


def join(left: RowTable, right: BatchRef, names: Mapping[str, str]) -> BatchRef:
    """Columns of `right` (renamed by `names`) for the rows of `left`, matched by group. Raises JoinError."""
    keys, first, counts = np.unique(right.rows.group, return_index=True, return_counts=True)
    if np.any(counts > 1):
        group = int(keys[np.argmax(counts > 1)])
        raise JoinError(f"join needs one row per group on the right side, group {group} has several")
    at = np.searchsorted(keys, left.group)
    inside = np.minimum(at, max(len(keys) - 1, 0))
    found = (at < len(keys)) & (keys[inside] == left.group) if len(keys) else np.zeros(len(left), dtype=bool)
    if not np.all(found):
        raise JoinError(f"join finds no row of group {int(left.group[np.argmin(found)])} on the right side")
    taken = right.take(first[at])
    return BatchRef(left, {names.get(name, name): column for name, column in taken.columns.items()})


def _readers(dataflow: Dataflow) -> dict[str, dict[str, set[str]]]:
    """Node -> column -> nodes that read it, or carry it for one that does."""
    readers: dict[str, dict[str, set[str]]] = {node.name: {} for node in dataflow}
    # Backwards, since a column carried along for nobody is not read.
    for node in reversed(dataflow.nodes):
        for entry in node.inputs:
            wanted: Sequence[ColumnOrigin] = [
                *entry.columns.values(),
                *(origin for name, origin in entry.carried.items() if readers[node.name].get(name)),
            ]
            for origin in wanted:
                readers[origin.node].setdefault(origin.column, set()).add(node.name)
    return readers
