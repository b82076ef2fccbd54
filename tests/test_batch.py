"""Batch: round trips, row operations, immutability, and no copies where none are needed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_dist.batch import Batch, Column

DTYPES = ("float32", "float64", "int8", "int32", "int64", "uint8", "bool")
QUICK = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@st.composite
def columns(draw: st.DrawFn, rows: int) -> Column:
    kind = draw(st.sampled_from(["dense", "matrix", "ragged", "wide", "text"]))
    if kind == "text":
        return Column.strings(draw(st.lists(st.text(max_size=6), min_size=rows, max_size=rows)))
    random, dtype = np.random.default_rng(draw(st.integers(0, 2**16))), draw(st.sampled_from(DTYPES))

    def numbers(*shape: int) -> np.ndarray:
        return (
            (random.normal(size=shape) * 50).astype(dtype) if dtype != "uint8" else random.integers(0, 9, shape, dtype)
        )

    if kind == "dense":
        return Column(numbers(rows))
    if kind == "matrix":
        return Column(numbers(rows, 2, 3))
    lengths = draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    return Column(numbers(int(offsets[-1]), *((3,) if kind == "wide" else ())), offsets)


@st.composite
def batches(draw: st.DrawFn, rows: int | None = None) -> Batch:
    count = draw(st.integers(0, 6)) if rows is None else rows
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True))
    return Batch({name: draw(columns(count)) for name in names})


def rows_of(batch: Batch) -> list[dict[str, Any]]:
    """Every row as plain Python data."""
    return [
        {name: value if isinstance(value, str) else np.asarray(value).tolist() for name, value in batch.row(i).items()}
        for i in range(batch.num_rows)
    ]


def assert_same(actual: Batch, expected: Batch) -> None:
    """Equal columns, kinds, dtypes and rows."""
    assert list(actual) == list(expected) and actual.num_rows == expected.num_rows
    for name, column in expected.items():
        assert actual[name].values.dtype == column.values.dtype, name
        assert actual[name].text == column.text
        assert (actual[name].offsets is None) == (column.offsets is None)
        if column.offsets is None:
            assert actual[name].values.shape == column.values.shape
    assert rows_of(actual) == rows_of(expected)


# --- round trips ---------------------------------------------------------------------------------
@QUICK
@given(batches())
def test_arrow_round_trip(batch: Batch) -> None:
    assert_same(Batch.from_arrow(batch.to_arrow()), batch)


@QUICK
@given(batches(), st.integers(0, 6), st.integers(0, 6))
def test_a_slice_survives_every_trip(batch: Batch, start: int, stop: int) -> None:
    part = batch.slice(start, stop)
    assert rows_of(part) == rows_of(batch)[start:stop]
    assert_same(Batch.from_arrow(part.to_arrow()), part)
    assert_same(Batch.from_arrow(batch.to_arrow().slice(start, max(0, stop - start))), part)


@QUICK
@given(batches())
def test_pickle_round_trip_with_buffers_out_of_band(batch: Batch) -> None:
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
    assert_same(pickle.loads(stream, buffers=buffers), batch)
    assert_same(pickle.loads(pickle.dumps(batch)), batch)


def test_pickle_of_a_batch_without_columns_keeps_its_rows() -> None:
    assert pickle.loads(pickle.dumps(Batch({}, 7))).num_rows == 7


@QUICK
@given(batch=batches())
def test_parquet_round_trip(batch: Batch, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "rows.parquet"
    batch.write_parquet(path)
    assert_same(Batch.read_parquet(path), batch)
    assert [file.name for file in path.parent.iterdir()] == ["rows.parquet"]


def test_anybodys_parquet_reader_sees_lists_strings_and_numbers(tmp_path: Path) -> None:
    batch = Batch.of(ids=[[1, 2], []], text=["a", "ü"], reward=[0.5, 1.5])
    batch.write_parquet(tmp_path / "x.parquet")
    expected = [{"ids": [1, 2], "text": "a", "reward": 0.5}, {"ids": [], "text": "ü", "reward": 1.5}]
    assert pq.read_table(tmp_path / "x.parquet").to_pylist() == expected


def test_tables_of_other_writers_are_read() -> None:
    table = pa.table(
        {
            "short": pa.array([[1], [2, 3]], pa.list_(pa.int32())),
            "text": pa.chunked_array([["a"], ["b"]]),
            "flag": pa.array([True, False]),
        }
    )
    batch = Batch.from_arrow(table)
    assert rows_of(batch) == [{"short": [1], "text": "a", "flag": True}, {"short": [2, 3], "text": "b", "flag": False}]


@pytest.mark.parametrize(
    "array", [pa.array([1, None]), pa.array([[[1]], [[2], [3]]]), pa.array([{"a": 1}]), pa.array([b"x"])]
)
def test_what_a_batch_cannot_hold_is_refused(array: pa.Array) -> None:
    with pytest.raises(TypeError):
        Column.from_arrow(array)


# --- row operations ------------------------------------------------------------------------------
@QUICK
@given(st.data())
def test_take_gives_the_rows_asked_for(data: st.DataObject) -> None:
    batch = data.draw(batches())
    index = data.draw(st.lists(st.integers(0, batch.num_rows - 1), max_size=9)) if batch.num_rows else []
    rows = rows_of(batch)
    assert rows_of(batch.take(index)) == [rows[i] for i in index]


@QUICK
@given(batches(), st.integers(0, 3))
def test_repeat_keeps_copies_adjacent(batch: Batch, times: int) -> None:
    assert rows_of(batch.repeat(times)) == [row for row in rows_of(batch) for _ in range(times)]


@QUICK
@given(batches(), st.lists(st.integers(0, 6), max_size=3))
def test_cutting_and_concatenating_is_the_identity(batch: Batch, cuts: list[int]) -> None:
    edges = sorted({0, batch.num_rows, *(min(cut, batch.num_rows) for cut in cuts)}) + [batch.num_rows]
    parts = [batch.slice(start, stop) for start, stop in zip(edges[:-1], edges[1:], strict=True)]
    assert_same(Batch.concat(parts), batch)


@QUICK
@given(st.lists(st.integers(-2, 3), max_size=12))
def test_groups_partition_the_rows_in_order_of_appearance(keys: list[int]) -> None:
    groups = Batch({"group_id": Column.dense(keys, np.int64)}).group()
    assert [keys[group[0]] for group in groups] == list(dict.fromkeys(keys))
    for group in groups:
        assert group.tolist() == [i for i, key in enumerate(keys) if key == keys[group[0]]]


def test_concat_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="no batches"):
        Batch.concat([])
    with pytest.raises(ValueError, match="same columns"):
        Batch.concat([Batch.of(a=[1]), Batch.of(b=[1])])
    with pytest.raises(ValueError, match="column 'a' differs"):
        Batch.concat([Batch.of(a=[1]), Batch.of(a=[[1]])])


# --- columns -------------------------------------------------------------------------------------
def test_column_operations_return_new_batches() -> None:
    batch = Batch.of(a=[1, 2], b=["x", "y"])
    assert list(batch.select("b")) == ["b"]
    assert list(batch.drop("b")) == ["a"]
    assert list(batch.rename(c="a")) == ["c", "b"]
    assert list(batch.with_columns(c=Column.dense([3, 4]))) == ["a", "b", "c"]
    assert list(batch) == ["a", "b"] and batch.num_rows == 2
    assert batch.select().num_rows == 2


def test_faulty_columns_are_refused_with_what_was_got() -> None:
    with pytest.raises(ValueError, match=r"same 2 rows, got \{'a': 2, 'b': 1\}"):
        Batch.of(a=[1, 2], b=[1])
    with pytest.raises(ValueError, match=r"end at len\(values\) = 3, got 0 ... 2"):
        Column(np.arange(3), np.array([0, 2]))
    with pytest.raises(ValueError, match="must not decrease"):
        Column(np.arange(3), np.array([0, 2, 1, 3]))
    with pytest.raises(ValueError, match=r"a text column has no values of shape \(2, 2\)"):
        Column(np.zeros((2, 2), np.uint8), np.array([0, 2]), text=True)
    with pytest.raises(KeyError, match="no column 'c'.*a, b"):
        Batch.of(a=[1], b=[2])["c"]
    with pytest.raises(KeyError):
        Batch.of(a=[1]).rename(x="b")


def test_a_batch_and_its_columns_cannot_be_assigned_to() -> None:
    batch = Batch.of(a=[1.0, 2.0])
    with pytest.raises(TypeError):
        batch["a"] = Column.dense([3.0, 4.0])  # type: ignore[index]
    with pytest.raises(AttributeError):
        batch["a"].values = np.zeros(2)  # type: ignore[misc]


# --- no copies -----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_go_to_arrow_and_back_without_a_copy(dtype: str) -> None:
    values = np.ones(6, dtype=dtype)
    for column in (Column(values), Column(values.reshape(3, 2)), Column(values, np.array([0, 2, 6]))):
        back = Column.from_arrow(column.to_arrow())
        assert np.shares_memory(back.values, values)
        if column.offsets is not None:
            assert back.offsets is not None and np.shares_memory(back.offsets, column.offsets)


def test_text_goes_to_arrow_and_back_without_a_copy() -> None:
    column = Column.strings(["ab", "c"])
    assert np.shares_memory(Column.from_arrow(column.to_arrow()).values, column.values)


def test_a_slice_is_a_view() -> None:
    column = Column.ragged([[1, 2], [3], [4, 5]])
    assert np.shares_memory(column.slice(1, 3).values, column.values)


def test_unpickled_buffers_are_the_ones_handed_in_and_read_only() -> None:
    batch = Batch({"a": Column(np.ones(1000, dtype=np.float32))})
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
    assert len(stream) < 1500, "values must travel out of band"
    frozen = [memoryview(bytes(buffer.raw())) for buffer in buffers]
    back = pickle.loads(stream, buffers=frozen)["a"].values
    assert any(np.shares_memory(back, np.frombuffer(view, np.uint8)) for view in frozen if view.nbytes)
    with pytest.raises(ValueError, match="read-only"):
        back[0] = 2
