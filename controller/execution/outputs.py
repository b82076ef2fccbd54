"""What finished nodes left, by reference: a node's inputs are put together from it, and read columns are let go.

    (generate, 7)  rows: group, tokens     columns: response_ids -> readers {critic, actor, reward}
                                                    finished     -> readers {}            dropped at once

A column is dropped when its last reader is done; the object store can then free it. Rows (two numbers
each) stay until the step ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from controller.execution.batch_ref import BatchRef, RowTable, StoredColumn, concat
from rlhf_dist.batch import IntArray
from rlhf_dist.dataflow.graph import Dataflow, Input, Node
from rlhf_dist.dataflow.row_algebra import Matching
from rlhf_dist.metrics import Mean, Metrics


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
    held: Any = None
    """See `Reply.held`."""
    places: tuple[IntArray, ...] = ()
    """For each answering rank: where its rows are in the batch."""


class RowsError(ValueError):
    """Rows that do not match, or are there twice."""


@dataclass
class _Kept:
    rows: RowTable
    columns: dict[str, StoredColumn]
    readers: dict[str, set[str]] = field(default_factory=dict)
    """Column -> nodes that will still read or carry it; empty where readers are not known."""


class Outputs:
    """Batches of the steps under way. `dataflow` None: who reads what is not known, all is kept."""

    def __init__(self, dataflow: Dataflow | None) -> None:
        self._readers: dict[str, dict[str, set[str]]] | None = None if dataflow is None else dataflow.column_readers
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
        carried = {}
        for name, at in entry.carried.items():  # what nobody will read is not kept, and not waited for
            kept = self._kept.get((at.node, step))
            if kept is not None and at.column in kept.columns:
                carried[name] = kept.columns[at.column]
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


def join(left: RowTable, right: BatchRef, names: Mapping[str, str], on: Matching = "group") -> BatchRef:
    """Columns of `right` (renamed by `names`) for the rows of `left`, matched as `RowAlgebra.join` says.

    Raises RowsError where a row matches none or several.
    """
    theirs = {"group": right.rows.group, "child": right.rows.parent}.get(on, right.rows.id)
    mine = {"group": left.group, "row": left.id, "parent": left.parent, "child": left.id}[on]
    keys, first, counts = np.unique(theirs, return_index=True, return_counts=True)
    if np.any(counts > 1):
        key = int(keys[np.argmax(counts > 1)])
        raise RowsError(f"join needs one row on the right side for each on the left, and {on} {key} has several there")
    at = np.searchsorted(keys, mine)
    inside = np.minimum(at, max(len(keys) - 1, 0))
    found = (at < len(keys)) & (keys[inside] == mine) if len(keys) else np.zeros(len(left), dtype=bool)
    if not np.all(found):
        missing = np.flatnonzero(~found)
        raise RowsError(
            f"join on {on} finds no row on the right side for {len(missing)} of {len(left)} rows "
            f"({on} {int(mine[missing[0]])} is the first)"
        )
    taken = right.take(first[at])
    return BatchRef(left, {names.get(name, name): column for name, column in taken.columns.items()})


def put_together(batches: Sequence[BatchRef], *, ordered: bool) -> BatchRef:
    """All rows of `batches` with the columns that all of them hold. ordered: as they were made.

    Raises RowsError for rows that are in several of them.
    """
    names = [name for name in batches[0].columns if all(name in batch.columns for batch in batches)]
    together = concat(batches, names)
    ids, counts = np.unique(together.rows.id, return_counts=True)
    if np.any(counts > 1):
        row = int(ids[np.argmax(counts > 1)])
        raise RowsError(
            f"{int((counts > 1).sum())} rows are in more than one of the batches (row_id {row} is the first)"
        )
    return together.take(np.argsort(together.rows.id, kind="stable")) if ordered else together


def first_groups(batches: Sequence[BatchRef], groups: int) -> tuple[BatchRef, Metrics]:
    """The rows of the first `groups` groups, in the order of batches and rows, and what was kept and dropped."""
    together = put_together(batches, ordered=False)
    found, first = np.unique(together.rows.group, return_index=True)
    wanted = found[np.argsort(first, kind="stable")][:groups]
    metrics: Metrics = {
        "groups": Mean(float(len(wanted)), 0),
        "surplus_groups": Mean(float(len(found) - len(wanted)), 0),
        "rounds": Mean(float(sum(len(batch.rows) > 0 for batch in batches)), 0),
    }
    return together.take(np.flatnonzero(np.isin(together.rows.group, wanted))), metrics
