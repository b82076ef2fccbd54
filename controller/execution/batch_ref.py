"""BatchRef: what the controller holds instead of data. Index arrays, object references, row lengths.

    BatchRef (4 rows)
      rows      group [7 7 9 9]   tokens [31 18 25 40]   id [64 65 66 67]   parent [32 32 33 33]
      columns   response_ids -> refs (A, B)   object [0 1 1 0]   row [0 0 1 1]
                rewards      -> refs (C,)     object [0 0 0 0]   row [0 1 2 3]

Row 2's response is row 1 of object B, its reward row 2 of object C. Columns that were written by
different ops may be cut differently. Filtering, repeating, joining and re-ordering rows changes index
arrays and nothing else; the controller's cost grows with rows and shards, never with tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_dist.batch import IntArray
from rlhf_dist.schema import ROW_IDS
from rlhf_dist.wire import Fetch


@dataclass(frozen=True, eq=False)
class Located:
    """Where the rows of one column group are: `refs[object_of[i]]`, row `row_of[i]`.

    Groups that one op wrote share the two arrays, and whatever is made of them is made once.
    """

    refs: tuple[Any, ...]
    object_of: npt.NDArray[np.int32]
    row_of: npt.NDArray[np.int32]
    pool: str = ""
    """Whose ranks wrote them, an object each; empty: not those of one pool alone."""


@dataclass(frozen=True, eq=False)
class StoredColumn:
    """A column inside stored objects, under the names its writers gave it."""

    at: Located
    names: tuple[str, ...]
    """Its name in each of `at.refs`: several where batches were put together that call it differently."""


ROW_BITS, NODE_BITS = 28, 12
"""Of a row's id: its position among the rows that a node makes, and that node's place in the recipe; above them the
step."""
NO_PARENT = -1


def made_ids(step: int, place: int, count: int) -> IntArray:
    """[B] ids of the rows that the node at `place` of the recipe makes at `step`: unique within a run, and the same
    however the rows are spread. Raises ValueError for more rows or nodes than ids tell apart."""
    if count > 1 << ROW_BITS or not 0 <= place < 1 << NODE_BITS:
        raise ValueError(
            f"a step may have {1 << NODE_BITS} nodes that make {1 << ROW_BITS} rows each, got node {place} with {count}"
        )
    return ((step << NODE_BITS | place) << ROW_BITS) + np.arange(count, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class RowTable:
    """What the controller knows of each row, all [B]."""

    group: IntArray
    tokens: IntArray
    """Prompt + response."""
    id: IntArray
    """Unique within a run."""
    parent: IntArray
    """The id of the row that a row was made of; NO_PARENT for a source's."""

    def __len__(self) -> int:
        return len(self.group)

    def take(self, index: IntArray) -> RowTable:
        """Rows `index`, in that order."""
        return RowTable(self.group[index], self.tokens[index], self.id[index], self.parent[index])

    def ids(self, names: Iterable[str], index: IntArray) -> dict[str, IntArray]:
        """Those of ROW_IDS that are among `names`, for rows `index`."""
        known = {"row_id": self.id, "parent_id": self.parent}
        return {name: known[name][index] for name in ROW_IDS if name in names}


@dataclass(frozen=True, eq=False)
class BatchRef:
    """Rows and where their columns are."""

    rows: RowTable
    columns: Mapping[str, StoredColumn]

    def take(self, index: IntArray) -> BatchRef:
        """Rows `index` of every column; columns that share objects keep sharing them."""
        moved: dict[int, Located] = {}
        arrays: dict[int, npt.NDArray[np.int32]] = {}
        for at in {id(column.at): column.at for column in self.columns.values()}.values():
            for array in (at.object_of, at.row_of):
                if id(array) not in arrays:
                    arrays[id(array)] = array[index]
            moved[id(at)] = Located(at.refs, arrays[id(at.object_of)], arrays[id(at.row_of)])
        columns = {name: StoredColumn(moved[id(column.at)], column.names) for name, column in self.columns.items()}
        return BatchRef(self.rows.take(index), columns)

    def select(self, names: Iterable[str]) -> BatchRef:
        """Only these columns."""
        return BatchRef(self.rows, {name: self.columns[name] for name in names})

    def home(self, parts: int, pool: str) -> IntArray | None:
        """[B] the part of `pool` that holds most of a row's columns, where it wrote some in as many parts; else None.

        How many ranks another pool has must decide nothing: they may come and go.
        """
        written = (c.at for c in self.columns.values() if c.at.pool == pool and len(c.at.refs) == parts)
        candidates = {id(at): at for at in written}
        return next(iter(candidates.values())).object_of.astype(np.int64) if candidates else None


Names = dict[str, tuple[str, ...]]
"""A column -> what each object calls it."""


class FetchPlan:
    """What ranks have to pull of `batch`: made once for a node, asked once for each rank."""

    def __init__(self, batch: BatchRef) -> None:
        groups: dict[int, tuple[Located, Names]] = {}
        for name, column in batch.columns.items():
            groups.setdefault(id(column.at), (column.at, {}))[1][name] = column.names
        self._alike: dict[tuple[int, int], list[tuple[Located, _NamesInObjects]]] = {}
        for at, names in groups.values():
            self._alike.setdefault((id(at.object_of), id(at.row_of)), []).append((at, _NamesInObjects(names)))

    def fetches(self, index: IntArray) -> tuple[Fetch, ...]:
        """For a rank that is to hold rows `index`: one entry per column group, with the objects it needs only."""
        plan: list[Fetch] = []
        for groups in self._alike.values():
            first = groups[0][0]
            used, object_of = _used(first.object_of[index])
            row_of = first.row_of[index]
            for at, names in groups:
                refs = tuple([at.refs[k] for k in used])
                plan.append(Fetch(names=names.of(used), refs=refs, object_of=object_of, row_of=row_of))
        return tuple(plan)


class _NamesInObjects:
    """The names of some columns in the objects that a rank pulls; made once for all ranks that pull as many objects,
    where all objects have the same ones (all do but joined batches with renamed columns)."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._alike = all(len(set(inside)) == 1 for inside in names.values())
        self._of_count: dict[int, Names] = {}

    def of(self, used: Sequence[int]) -> Names:
        """For the objects at places `used`, in that order."""
        if not self._alike:
            return {seen: tuple(inside[k] for k in used) for seen, inside in self._names.items()}
        if len(used) not in self._of_count:
            self._of_count[len(used)] = {seen: inside[:1] * len(used) for seen, inside in self._names.items()}
        return self._of_count[len(used)]


FEW_ROWS = 64
"""Up to here Python's set is faster than sorting an array."""


def _used(object_of: npt.NDArray[np.int32]) -> tuple[Sequence[int], npt.NDArray[np.int32]]:
    """The distinct objects, ascending, and for each row its position among them."""
    if len(object_of) == 0:
        return (0,), object_of  # A rank without rows learns the columns' types from an object.
    if len(object_of) <= FEW_ROWS:
        each = object_of.tolist()
        few = sorted(set(each))
        if len(few) == 1:
            return few, np.zeros(len(each), dtype=np.int32)
        place = {one: k for k, one in enumerate(few)}
        return few, np.array([place[one] for one in each], dtype=np.int32)
    if (object_of == object_of[0]).all():  # rows that stayed where they are: the common case
        return (int(object_of[0]),), np.zeros(len(object_of), dtype=np.int32)
    used, inverse = np.unique(object_of, return_inverse=True)
    return used.tolist(), inverse.astype(np.int32)


def merge_stored(
    stored: Sequence[Sequence[tuple[tuple[str, ...], Any]]], order: IntArray, counts: Sequence[int], pool: str = ""
) -> dict[str, StoredColumn]:
    """Columns of an op's output from what each answering rank stored.

    stored: per rank, (column names, object reference) pairs, the same grouping on every rank. counts:
    rows on each rank. order: [B] positions in the ranks' concatenated rows, in the batch's row order. pool: theirs.
    """
    object_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[order]
    row_of = np.concatenate([np.arange(count, dtype=np.int32) for count in counts] or [np.empty(0, np.int32)])[order]
    columns: dict[str, StoredColumn] = {}
    for group, (names, _) in enumerate(stored[0] if stored else ()):
        at = Located(tuple(rank[group][1] for rank in stored), object_of, row_of, pool)
        columns.update({name: StoredColumn(at, (name,) * len(at.refs)) for name in names})
    return columns


def concat(batches: Sequence[BatchRef], names: Iterable[str]) -> BatchRef:
    """All rows of `batches`, one batch after the other, with the columns `names` that each of them has."""
    together: dict[tuple[int, ...], Located] = {}
    columns: dict[str, StoredColumn] = {}
    for name in names:
        parts = [batch.columns[name] for batch in batches]
        key = tuple(id(part.at) for part in parts)
        if key not in together:
            starts = np.cumsum([0, *(len(part.at.refs) for part in parts)])
            together[key] = Located(
                tuple(ref for part in parts for ref in part.at.refs),
                np.concatenate([part.at.object_of + np.int32(s) for part, s in zip(parts, starts, strict=False)]),
                np.concatenate([part.at.row_of for part in parts]),
            )
        columns[name] = StoredColumn(together[key], tuple(inside for part in parts for inside in part.names))
    tables = [batch.rows for batch in batches]
    rows = RowTable(
        *(np.concatenate([getattr(t, name) for t in tables]) for name in ("group", "tokens", "id", "parent"))
    )
    return BatchRef(rows, columns)
