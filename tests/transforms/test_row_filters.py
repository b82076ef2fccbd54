"""Host ops that drop rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import as_result
from rlhf_dist.metrics import Mean
from rlhf_dist.transforms import best_of_group, drop_equal_groups, keep_best_and_worst


def batch_of(rewards: list[float], groups: list[int]) -> Batch:
    return Batch({"rewards": Column.dense(rewards, np.float32), "group_id": Column.dense(groups, np.int64)})


# Group 5: rows 0, 2, 4; group 1: rows 1, 3 (equal); group 9: row 5 alone.
BATCH = batch_of([1, 7, 3, 7, 0, 2], [5, 1, 5, 1, 5, 9])


def test_keep_best_and_worst_makes_one_pair_of_each_group_that_has_a_preference() -> None:
    result = as_result(keep_best_and_worst(BATCH))
    assert result.keep is not None and result.keep.tolist() == [2, 4]
    assert result.columns["label"].values.tolist() == [1, -1]
    assert result.columns["label"].values.dtype == np.int8
    assert result.columns["margin"].values.tolist() == [3, 3]
    assert result.metrics["pairs"].value == 1
    assert result.metrics["zero_variance_groups"] == Mean(2.0, 3.0)
    assert result.metrics["pair_margin"].value == 3


def test_the_first_row_wins_a_tie() -> None:
    result = as_result(keep_best_and_worst(batch_of([0, 1, 1, 0], [0, 0, 0, 0])))
    assert result.keep is not None and result.keep.tolist() == [0, 1]
    assert result.columns["label"].values.tolist() == [-1, 1]


def test_drop_equal_groups_keeps_what_can_teach() -> None:
    result = as_result(drop_equal_groups(BATCH))
    assert result.keep is not None and result.keep.tolist() == [0, 2, 4]
    assert result.metrics["zero_variance_groups"] == Mean(2.0, 3.0)


def test_best_of_group_keeps_one_row_of_every_group() -> None:
    result = as_result(best_of_group(BATCH))
    assert result.keep is not None and result.keep.tolist() == [1, 2, 5]
    assert result.metrics["best_reward"].value == 4


def test_all_groups_equal_leaves_no_rows_and_no_nan() -> None:
    result = as_result(keep_best_and_worst(batch_of([1, 1], [0, 0])))
    assert result.columns.num_rows == 0 and result.metrics["pair_margin"].value == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.5, 1.0])), max_size=20))
def test_pairs_hold_their_groups_extremes(rows: list[tuple[int, float]]) -> None:
    batch = batch_of([reward for _, reward in rows], [group for group, _ in rows])
    result = as_result(keep_best_and_worst(batch))
    assert result.keep is not None and (np.diff(result.keep) > 0).all()
    for row, label in zip(result.keep, result.columns["label"].values, strict=True):
        rewards = [reward for group, reward in rows if group == rows[row][0]]
        assert rows[row][1] == (max(rewards) if label == 1 else min(rewards))
    unequal = {g for g, _ in rows if len({r for group, r in rows if group == g}) > 1}
    assert sorted(rows[row][0] for row in result.keep) == sorted([*unequal, *unequal])
