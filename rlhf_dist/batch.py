"""Batch: immutable named columns of rows, dense or ragged, that travel as Arrow without a copy.

    Batch (3 rows)
      group_id      dense   values [3]
      response_ids  ragged  values [7]     offsets [0, 2, 5, 7]     row 1 = values[2:5]
      prompt        text    values [n] u8  offsets [0, ...]         UTF-8, one string a row
      top_ids       ragged  values [7, k]  offsets [0, 2, 5, 7]     k numbers an entry

A row is a trajectory; nothing is padded. Every column is numpy arrays, so a batch read from Ray's
object store is a view of shared memory (read-only: copy before writing in place). Arrow and Parquet
use the same buffers: primitive arrays for dense, large lists for ragged, large strings for text, lists
of a fixed size for dims behind these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Column:
    """One column. Dense: `values` [B, ...], no offsets. Ragged: [N, ...] and `offsets` [B + 1], text too: [N] bytes."""

    values: npt.NDArray[Any]
    offsets: IntArray | None = None
    text: bool = False

    def __post_init__(self) -> None:
        if self.offsets is None:
            return
        if self.values.ndim < 1 or (self.text and self.values.ndim != 1):
            raise ValueError(f"a {'text' if self.text else 'ragged'} column has no values of shape {self.values.shape}")
        if len(self.offsets) == 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.values):
            raise ValueError(
                f"offsets must start at 0 and end at len(values) = {len(self.values)}, got {_ends(self.offsets)}"
            )
        if np.any(np.diff(self.offsets) < 0):
            raise ValueError("offsets must not decrease: a row cannot have a negative length")

    @staticmethod
    def dense(values: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> Column:
        """A dense column [B, ...]."""
        return Column(np.asarray(values, dtype=dtype))

    @staticmethod
    def ragged(rows: Sequence[npt.ArrayLike], dtype: npt.DTypeLike | None = None) -> Column:
        """A ragged column from one array per row; `dtype` is needed only when every row may be empty."""
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(array) for array in arrays], out=offsets[1:])
        values = np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype or np.float32)
        return Column(values, offsets)

    @staticmethod
    def strings(rows: Sequence[str]) -> Column:
        """A text column, one string per row."""
        encoded = [row.encode() for row in rows]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in encoded], out=offsets[1:])
        return Column(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets, text=True)

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    @property
    def lengths(self) -> IntArray:
        """Entries per row, [B]; 1 for a dense column."""
        return np.ones(len(self), dtype=np.int64) if self.offsets is None else np.diff(self.offsets)

    @property
    def nbytes(self) -> int:
        """Bytes of values and offsets."""
        return self.values.nbytes + (0 if self.offsets is None else self.offsets.nbytes)

    def row(self, index: int) -> Any:
        """Row `index`: a number or array (dense), a view of its entries (ragged), a string (text)."""
        if self.offsets is None:
            return self.values[index]
        index = range(len(self))[index]
        view = self.values[self.offsets[index] : self.offsets[index + 1]]
        return view.tobytes().decode() if self.text else view

    def rows(self) -> list[Any]:
        """All rows, as `row` gives them."""
        return [self.row(index) for index in range(len(self))]

    def take(self, index: npt.ArrayLike) -> Column:
        """Rows `index`, in that order, with repeats allowed. O(entries taken)."""
        index = np.asarray(index, dtype=np.int64)
        if self.offsets is None:
            return Column(self.values[index])
        lengths = self.lengths[index]
        offsets = np.zeros(len(index) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        # Entry k of the result comes from (start of its source row) + (k - start of its result row).
        source = np.repeat(self.offsets[index] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Column(self.values[source], offsets, self.text)

    def slice(self, start: int, stop: int) -> Column:
        """Rows [start, stop) without copying values."""
        if self.offsets is None:
            return Column(self.values[start:stop])
        start, stop, _ = slice(start, stop).indices(len(self))
        first, last = int(self.offsets[start]), int(self.offsets[max(start, stop)])
        return Column(self.values[first:last], self.offsets[start : max(start, stop) + 1] - first, self.text)

    def to_arrow(self) -> pa.Array:
        """The same buffers as an Arrow array (booleans are stored one per byte)."""
        import pyarrow as pa

        flat = np.ascontiguousarray(self.values)
        if self.offsets is None:
            return _arrow_entries(flat)
        if self.text:
            return pa.LargeStringArray.from_buffers(len(self), pa.py_buffer(self.offsets), pa.py_buffer(flat))
        return pa.LargeListArray.from_arrays(pa.array(self.offsets), _arrow_entries(flat))

    @staticmethod
    def from_arrow(array: pa.Array | pa.ChunkedArray) -> Column:
        """The column an Arrow array holds; no copy for the types `to_arrow` writes.

        Raises TypeError for nested lists of varying length, nulls and other types a batch cannot hold.
        """
        import pyarrow as pa

        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0) if array.num_chunks == 1 else array.combine_chunks()
        if array.null_count:
            raise TypeError(f"a batch column has no nulls, got {array.null_count} in an Arrow {array.type}")
        kind = array.type
        if pa.types.is_string(kind) or (pa.types.is_large_string(kind) and array.offset):
            return Column.strings(array.to_pylist())
        if pa.types.is_large_string(kind):
            _, offsets, data = array.buffers()
            ends = np.frombuffer(offsets, np.int64)[: len(array) + 1] if offsets else np.zeros(1, np.int64)
            values = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]] if data else np.empty(0, np.uint8)
            return Column(values, ends - ends[0] if ends[0] else ends, text=True)
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            ends = np.asarray(array.offsets.to_numpy(zero_copy_only=False), dtype=np.int64)
            values = array.values.slice(int(ends[0]), int(ends[-1] - ends[0]))
            return Column(_numpy_entries(values), ends - ends[0] if ends[0] else ends)
        return Column(_numpy_entries(array))


class Batch(Mapping[str, Column]):
    """Immutable named columns with the same number of rows. Every operation returns a new batch."""

    __slots__ = ("_columns", "num_rows")

    def __init__(self, columns: Mapping[str, Column], num_rows: int | None = None) -> None:
        """Raises ValueError if the columns differ in length; `num_rows` is needed only without columns."""
        lengths = {name: len(column) for name, column in columns.items()}
        if num_rows is None:
            num_rows = next(iter(lengths.values()), 0)
        wrong = {name: length for name, length in lengths.items() if length != num_rows}
        if wrong:
            raise ValueError(f"every column of a batch must have the same {num_rows} rows, got {lengths}")
        self._columns = dict(columns)
        self.num_rows = num_rows

    @staticmethod
    def of(**columns: Any) -> Batch:
        """A batch from plain data: strings -> text, nested lists of varying length -> ragged, else dense."""
        return Batch({name: _infer(data) for name, data in columns.items()})

    # --- reading ---------------------------------------------------------------------------------
    def __getitem__(self, name: str) -> Column:
        try:
            return self._columns[name]
        except KeyError:
            raise KeyError(f"no column {name!r} in this batch; it has {', '.join(self._columns) or 'none'}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        """Number of columns, as for any mapping; rows are `num_rows`."""
        return len(self._columns)

    def __repr__(self) -> str:
        parts = [f"{name}: {column.values.dtype}{_kind(column)}" for name, column in self.items()]
        return f"Batch({self.num_rows} rows; {', '.join(parts)})"

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(column.nbytes for column in self.values())

    def row(self, index: int) -> dict[str, Any]:
        """One row as a dict, for people and rewards."""
        return {name: column.row(index) for name, column in self.items()}

    # --- columns ---------------------------------------------------------------------------------
    def select(self, *names: str) -> Batch:
        """Only these columns."""
        return Batch({name: self[name] for name in names}, self.num_rows)

    def drop(self, *names: str) -> Batch:
        """All but these columns."""
        return Batch({name: column for name, column in self.items() if name not in names}, self.num_rows)

    def rename(self, **new_from_old: str) -> Batch:
        """Columns renamed as `new="old"`; the others stay."""
        new_of = {old: new for new, old in new_from_old.items()}
        for old in new_of:
            self[old]
        return Batch({new_of.get(name, name): column for name, column in self.items()}, self.num_rows)

    def with_columns(self, other: Mapping[str, Column] | None = None, **columns: Column) -> Batch:
        """This batch with columns added or replaced."""
        return Batch({**self._columns, **(other or {}), **columns}, self.num_rows)

    # --- rows ------------------------------------------------------------------------------------
    def take(self, index: npt.ArrayLike) -> Batch:
        """Rows `index` in that order: re-order, filter and repeat are all this."""
        index = np.asarray(index, dtype=np.int64)
        return Batch({name: column.take(index) for name, column in self.items()}, len(index))

    def slice(self, start: int, stop: int) -> Batch:
        """Rows [start, stop) as views."""
        rows = len(range(*slice(start, stop).indices(self.num_rows)))
        return Batch({name: column.slice(start, stop) for name, column in self.items()}, rows)

    def repeat(self, times: int) -> Batch:
        """Every row `times` times, copies adjacent: a a b b."""
        return self.take(np.repeat(np.arange(self.num_rows), times))

    @staticmethod
    def concat(batches: Sequence[Batch]) -> Batch:
        """Rows of all batches in order. Raises ValueError if they differ in columns or kinds."""
        if not batches:
            raise ValueError("cannot concatenate no batches: the columns would be unknown")
        names = list(batches[0])
        for batch in batches[1:]:
            if set(batch) != set(names):
                raise ValueError(f"batches to concatenate must have the same columns, got {names} and {list(batch)}")
        if len(batches) == 1:
            return batches[0]
        columns = {name: _concat_columns(name, [batch[name] for batch in batches]) for name in names}
        return Batch(columns, sum(batch.num_rows for batch in batches))

    def group(self, by: str = "group_id") -> list[IntArray]:
        """Row indices of each group, groups in order of first appearance, rows in order."""
        keys = self[by].values
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(inverse))[:-1]) if len(keys) else []
        return [parts[k] for k in np.argsort(first, kind="stable")]

    # --- Arrow -----------------------------------------------------------------------------------
    def to_arrow(self) -> pa.Table:
        """The same buffers as an Arrow table."""
        import pyarrow as pa

        if not self._columns:
            raise ValueError("a batch without columns has no Arrow form")
        return pa.table({name: column.to_arrow() for name, column in self.items()})

    @staticmethod
    def from_arrow(table: pa.Table) -> Batch:
        """The batch an Arrow table holds, without a copy where the types allow it."""
        return Batch({name: Column.from_arrow(table.column(name)) for name in table.column_names}, table.num_rows)

    def write_parquet(self, path: str | Path) -> None:
        """Write to `path` in one atomic step; anybody's Parquet reader opens it."""
        import pyarrow.parquet as pq

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        pq.write_table(self.to_arrow(), partial)
        partial.replace(target)

    @staticmethod
    def read_parquet(path: str | Path) -> Batch:
        """The batch that `write_parquet` wrote."""
        import pyarrow.parquet as pq

        return Batch.from_arrow(pq.read_table(path))

    def __reduce__(self) -> tuple[Any, ...]:
        # Arrow tables pickle with out-of-band buffers: Ray keeps them in shared memory, uncopied.
        if not self._columns:
            return Batch, ({}, self.num_rows)
        return Batch.from_arrow, (self.to_arrow(),)


def _infer(data: Any) -> Column:
    if isinstance(data, Column):
        return data
    if isinstance(data, np.ndarray) and data.dtype != object:
        return Column.dense(data)
    rows = list(data)
    if rows and all(isinstance(row, str) for row in rows):
        return Column.strings(rows)
    if rows and all(isinstance(row, list | tuple | np.ndarray) for row in rows):
        kinds = [np.asarray(row).dtype for row in rows if len(row)]
        return Column.ragged(rows, dtype=np.result_type(*kinds) if kinds else np.float64)
    return Column.dense(rows)


def _concat_columns(name: str, columns: Sequence[Column]) -> Column:
    kinds = {_kind(column) for column in columns}
    if len(kinds) > 1:
        raise ValueError(f"column {name!r} differs between the batches to concatenate: {sorted(kinds)}")
    values = np.concatenate([column.values for column in columns])
    if columns[0].offsets is None:
        return Column(values)
    lengths = np.concatenate([column.lengths for column in columns])
    return Column(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), columns[0].text)


def _kind(column: Column) -> str:
    if column.text:
        return "text"
    first = ["B"] if column.offsets is None else ["B", "*"]
    return str([*first, *column.values.shape[1:]]).replace("'", "")


def _ends(offsets: IntArray) -> str:
    return "no offsets" if len(offsets) == 0 else f"{offsets[0]} ... {offsets[-1]}"


def _arrow_entries(values: npt.NDArray[Any]) -> pa.Array:
    """[N, ...] as N entries; `values` is contiguous."""
    import pyarrow as pa

    array = _arrow_primitive(values.reshape(-1))
    for width in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, width)
    return array


def _numpy_entries(array: pa.Array) -> npt.NDArray[Any]:
    """What `_arrow_entries` made into an Arrow array."""
    import pyarrow as pa

    shape: list[int] = [len(array)]
    while pa.types.is_fixed_size_list(array.type):
        shape.append(array.type.list_size)
        array = array.flatten()
    return _numpy_primitive(array).reshape(shape)


def _arrow_primitive(values: npt.NDArray[Any]) -> pa.Array:
    import pyarrow as pa

    if values.dtype == np.bool_:
        return pa.ExtensionArray.from_storage(pa.bool8(), pa.array(values.view(np.int8)))
    return pa.array(values)


def _numpy_primitive(array: pa.Array) -> npt.NDArray[Any]:
    import pyarrow as pa

    if array.type == pa.bool8():
        return np.asarray(array.storage.to_numpy(zero_copy_only=True)).view(np.bool_)
    if pa.types.is_boolean(array.type):
        return np.asarray(array.to_numpy(zero_copy_only=False), dtype=np.bool_)
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        raise TypeError(f"a batch column holds numbers, lists of numbers or text, not Arrow {array.type}")
    return np.asarray(array.to_numpy(zero_copy_only=True))
