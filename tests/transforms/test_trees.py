"""Ops on rows that are leaves of trees, against values worked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_dist.batch import Batch, Column
from rlhf_dist.missing import MISSING
from rlhf_dist.transforms import tree_advantage, tree_nodes, tree_pairs


def batch_of(rows: list[tuple[int, str, list[int], float]], leaf: list[int] | None = None) -> Batch:
    """(tree, branch, segment of each token, reward) -> rows of group 5; a token's id is 10 * tree + segment."""
    segments = [np.array(row[2], np.int32) for row in rows]
    ids = [np.array([10 * row[0] + segment for segment in row[2]], np.int32) for row in rows]
    ones = [np.ones(len(row[2])) for row in rows]
    return Batch(
        {
            "tree": Column(np.array([row[0] for row in rows])),
            "branch": Column.strings([row[1] for row in rows]),
            "leaf": Column(np.array(leaf or [1] * len(rows), np.uint8)),
            "segment": Column.ragged(segments, np.int32),
            "rewards": Column(np.array([row[3] for row in rows], np.float32)),
            "group_id": Column(np.full(len(rows), 5)),
            "response_mask": Column.ragged(ones, np.uint8),
            "prompt_ids": Column.ragged([np.array([1], np.int32)] * len(rows), np.int32),
            "response_ids": Column.ragged(ids, np.int32),
            "rollout_log_probs": Column.ragged([-0.1 * one for one in ones], np.float32),
        }
    )


# Tree 7: segment 0, then 1 (which parts into 3 and 4) and 2. V(3) = 1, V(4) = 0, V(1) = 1/2, V(2) = 2,
# V(0) = (1 + 0 + 2) / 3 = 1. Tree 8 is one row of reward 3, so V(prompt) = (1 + 3) / 2 = 2.
TWO_TREES = [
    (7, "0/0", [0, 0, 1, 3], 1.0),
    (7, "0/1", [0, 0, 1, 4], 0.0),
    (7, "1", [0, 0, 2, 2], 2.0),
    (8, "", [0], 3.0),
]
EXPECTED: dict[str, list[list[float]]] = {
    "siblings": [[-1, -1, -0.75, 0.5], [-1, -1, -0.75, -0.5], [-1, -1, 0.75, 0.75], [1]],
    "parent": [[-1, -1, -0.5, 0.5], [-1, -1, -0.5, -0.5], [-1, -1, 1, 1], [1]],
    "prompt": [[-1, -1, -1.5, -1], [-1, -1, -1.5, -2], [-1, -1, 0, 0], [1]],
    "parent_and_prompt": [[-2, -2, -2, -0.5], [-2, -2, -2, -2.5], [-2, -2, 1, 1], [2]],
}


def advantages(batch: Batch, **settings: Any) -> list[list[float]]:
    return [row.tolist() for row in tree_advantage(batch, **settings).columns["advantages"].rows()]


@pytest.mark.parametrize("against", sorted(EXPECTED))
def test_a_step_is_worth_what_came_of_it(against: Any) -> None:
    assert advantages(batch_of(TWO_TREES), against=against, once=False) == EXPECTED[against]


def test_a_token_of_several_rows_counts_once() -> None:
    result = tree_advantage(batch_of(TWO_TREES))
    masks = [row.tolist() for row in result.columns["response_mask"].rows()]
    assert masks == [[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1], [1]]
    assert result.columns["advantages"].row(1).tolist() == [0, 0, 0, -0.5]
    metrics = {name: metric.value for name, metric in result.metrics.items()}
    assert metrics == pytest.approx(
        {"reward": 1.5, "trees": 2, "forks": 3, "equal_forks": 0, "missing_rewards": 0, "shared_tokens": 5 / 13}
    )


def test_scales() -> None:
    scaled = advantages(batch_of(TWO_TREES), scale=True, eps=0.0)
    assert scaled == [[-1, -1, -1, 1], [0, 0, 0, -1], [0, 0, 1, 1], [1]], "two siblings are one deviation apart"
    spread = np.std([1, 0, 2, 3])
    found = advantages(batch_of(TWO_TREES), against="prompt", scale=True, eps=0.0, once=False)
    np.testing.assert_allclose(found[0], np.array([-1, -1, -1.5, -1]) / spread, rtol=1e-6)
    shrunk = advantages(batch_of(TWO_TREES), against="parent_and_prompt", leaf_power=0.5, once=False)
    np.testing.assert_allclose(shrunk[0], [-2 / 3**0.5, -2 / 3**0.5, -2 / 2**0.5, -0.5], rtol=1e-6)


def test_without_trees_it_is_the_group_mean() -> None:
    rows = [(tree, "", [0, 0], float(tree)) for tree in range(4)]
    for against in ("siblings", "parent", "prompt"):
        assert [row[0] for row in advantages(batch_of(rows), against=against)] == [-1.5, -0.5, 0.5, 1.5]
    assert advantages(batch_of(rows[:1])) == [[0, 0]]
    assert advantages(batch_of(TWO_TREES).slice(0, 0)) == []


def test_a_shift_of_all_rewards_changes_nothing() -> None:
    moved = [(tree, branch, segments, reward + 8) for tree, branch, segments, reward in TWO_TREES]
    for against in EXPECTED:
        assert advantages(batch_of(moved), against=against) == advantages(batch_of(TWO_TREES), against=against)


def test_missing_rewards_are_no_part_of_any_value() -> None:
    rows = [*TWO_TREES[:1], (7, "0/1", [0, 0, 1, 4], MISSING), *TWO_TREES[2:]]
    result = tree_advantage(batch_of(rows), against="siblings")
    # V(1) = V(3) = 1, V(2) = 2, V(0) = 3/2, V(prompt) = (3/2 + 3) / 2; segment 3 is alone and has that of 1.
    assert result.columns["advantages"].row(0).tolist() == [-0.75, -0.75, -0.5, -0.5]
    assert result.columns["response_mask"].row(1).tolist() == [0, 0, 0, 0]
    assert result.metrics["missing_rewards"].value == 1


def test_a_closed_context_has_what_came_after_it() -> None:
    rows = [
        (7, ".0", [0], 9.0),  # closed, then the leaves part in the context after it
        (7, "0.1", [1], 1.0),
        (7, "1.1", [2], 0.0),
        (8, "", [0], 2.5),
    ]
    batch = batch_of(rows, leaf=[0, 1, 1, 1])
    assert advantages(batch, against="siblings") == [[-1], [0.5], [-0.5], [1]]
    assert advantages(batch, against="prompt") == [[-1], [-0.5], [-1.5], [1]]


def test_pairs_are_the_best_and_the_worst_of_each_fork() -> None:
    result = tree_pairs(batch_of(TWO_TREES))
    made = result.columns
    assert result.parent is not None and result.parent.tolist() == [3, 0, 2, 0, 0, 1]
    assert made["label"].values.tolist() == [1, -1] * 3 and made["margin"].values.tolist() == [2, 2, 1.5, 1.5, 1, 1]
    assert [row.tolist() for row in made["prompt_ids"].rows()] == [[1], [1], *[[1, 70, 70]] * 2, *[[1, 70, 70, 71]] * 2]
    assert [row.tolist() for row in made["response_ids"].rows()] == [[80], [70, 70], [72, 72], [71], [73], [74]]
    assert made["leaves"].values.tolist() == [1, 3, 1, 2, 1, 1] and made["depth"].values.tolist() == [0, 0, 1, 1, 2, 2]
    names = made["group_id"].values.tolist()
    assert names[::2] == names[1::2] and len(set(names)) == 3
    assert result.metrics["pairs"].value == 3 and result.metrics["equal_forks"].value == 0
    wide = tree_pairs(batch_of(TWO_TREES), least_gap=1.0)
    assert wide.columns["margin"].values.tolist() == [2, 2, 1.5, 1.5] and wide.metrics["equal_forks"].value == 1 / 3
    # Cut elsewhere, the same pairs have the same names.
    alone = tree_pairs(batch_of(TWO_TREES[:3]))
    assert alone.columns["group_id"].values.tolist() == names[2:]


def test_a_second_opinion_is_mixed_in() -> None:
    batch = batch_of(TWO_TREES).with_columns({"judged": Column(np.array([0, 4, 0, 0], np.float32))})
    # Half of search and half of what is said: Q(3) = 1/2, Q(4) = 2, Q(1) = 1/4 + 1, Q(2) = 1.
    result = tree_pairs(batch, value="judged", share=0.5)
    assert result.columns["response_ids"].row(4).tolist() == [74] and result.columns["margin"].values[-1] == 1.5
    assert result.columns["response_ids"].row(2).tolist() == [71] and result.columns["margin"].values[2] == 0.25


def test_steps_have_mean_values_or_bellmans() -> None:
    mean = tree_nodes(batch_of(TWO_TREES))
    steps = [row.tolist() for row in mean.columns["response_ids"].rows()]
    assert steps == [[70, 70], [71], [73], [74], [72, 72], [80]]
    assert mean.columns["rewards"].values.tolist() == [1, 0.5, 1, 0, 2, 3]
    best = tree_nodes(batch_of(TWO_TREES), backup="max", gamma=0.5)
    # Q(1) = max(1, 0) / 2, Q(0) = max(Q(1), Q(2)) / 2 = 1.
    assert best.columns["rewards"].values.tolist() == [1, 0.5, 1, 0, 2, 3]
    assert tree_nodes(batch_of(TWO_TREES), backup="max").columns["rewards"].values.tolist() == [2, 1, 1, 0, 2, 3]


def test_a_context_that_a_row_follows_on_is_among_the_rows() -> None:
    with pytest.raises(ValueError, match="tree 7 has none 0 for branch '0.1'; keep rows with leaf 0"):
        tree_advantage(batch_of([(7, "0.1", [1], 1.0), (7, "1", [2], 0.0)]))


def test_steps_of_a_chain_are_counted_before_a_run() -> None:
    chain = batch_of([(7, "0/0", [0, 1, 2], 1.0)])
    with pytest.raises(ValueError, match=r"at most 2 steps for each row \(most_steps\), got 3 of 1 rows"):
        tree_nodes(chain)
    assert tree_nodes(chain, most_steps=3).columns.num_rows == 3
    assert (tree_nodes.copies_for({"most_steps": 3}), tree_nodes.copies_for({})) == (3, 2)
