"""Rewards that are missing: in no baseline, not trained on, counted; worked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import as_result
from rlhf_dist.metrics import Mean
from rlhf_dist.missing import MISSING, is_missing, refuse_missing
from rlhf_dist.rewards.rule import reward_columns
from rlhf_dist.testing import CheckFailed, check_recipe
from rlhf_dist.transforms import (
    best_of_group,
    clip_rewards,
    drop_equal_groups,
    drop_missing,
    gae,
    grpo_advantage,
    keep_best_and_worst,
    penalise_cut_responses,
    remax_advantage,
    rloo_advantage,
    whiten,
    whiten_rewards,
)


def batch_of(rewards: list[Any], groups: list[int], **more: Any) -> Batch:
    """Two counted tokens a row."""
    rows = len(rewards)
    columns = {
        "rewards": Column(np.array(rewards, dtype=np.float32)),
        "group_id": Column.dense(groups, np.int64),
        "response_mask": Column.ragged([[1, 1]] * rows, dtype="uint8"),
        "values": Column.ragged([[0.0, 0.0]] * rows, dtype="float32"),
        "finished": Column(np.ones(rows, dtype=np.uint8)),
    }
    return Batch(columns | more, rows)


# Group 0: 1, missing, 3. Group 1: missing, 5. Group 2: missing twice. Group 3: 0, 2.
BATCH = batch_of([1, MISSING, 3, MISSING, 5, MISSING, MISSING, 0, 2], [0, 0, 0, 1, 1, 2, 2, 3, 3])
LOST = [1, 3, 5, 6]


def first_tokens(column: Column) -> list[float]:
    return [float(row[0]) for row in column.rows()]


def test_a_missing_reward_is_told_from_what_arithmetic_makes() -> None:
    values = np.array([MISSING, -MISSING, np.nan, 0, np.inf], dtype=np.float32)
    assert is_missing(values).tolist() == [True, True, False, False, False]
    assert is_missing(values.astype(np.float64)).tolist() == [True, True, False, False, False]
    assert is_missing((values[:1] - 3) * 2 + values[3:4])[0] and np.isnan(MISSING)


def test_a_group_is_the_rows_that_have_a_reward() -> None:
    grpo = as_result(grpo_advantage(BATCH, scale=False))
    # Group 0: 1 and 3, mean 2. Group 1: 5 alone. Group 2: nothing. Group 3: 0 and 2, mean 1.
    assert first_tokens(grpo.columns["advantages"]) == [-1, 0, 1, 0, 0, 0, 0, -1, 1]
    assert [row for row, mask in enumerate(grpo.columns["response_mask"].rows()) if not mask.any()] == LOST
    assert grpo.columns["response_mask"].values.dtype == np.uint8
    assert grpo.metrics["missing_rewards"] == Mean(4, 0)
    assert grpo.metrics["reward"] == Mean(11.0, 5.0)
    assert grpo.metrics["groups"].value == 3 and grpo.metrics["singleton_groups"] == Mean(1, 3)
    assert grpo.metrics["zero_variance_groups"] == Mean(1, 3)
    rloo = as_result(rloo_advantage(BATCH))
    assert first_tokens(rloo.columns["advantages"]) == [-2, 0, 2, 0, 0, 0, 0, -2, 2]
    assert [row for row, mask in enumerate(rloo.columns["response_mask"].rows()) if not mask.any()] == LOST


def test_the_others_advantages_are_what_they_are_without_the_missing_rows() -> None:
    present = [row for row in range(BATCH.num_rows) if row not in LOST]
    for op, arguments in ((grpo_advantage, {}), (grpo_advantage, {"scale_over": "batch"}), (rloo_advantage, {})):
        whole = as_result(op(BATCH, **arguments)).columns["advantages"]
        alone = as_result(op(BATCH.take(present), **arguments)).columns["advantages"]
        np.testing.assert_array_equal(whole.take(present).values, alone.values)


def test_a_baseline_that_is_missing_has_no_row() -> None:
    batch = BATCH.with_columns(baseline_rewards=Column(np.array([0, 0, MISSING, 0, 1, 0, 0, 0, 0], dtype=np.float32)))
    result = as_result(remax_advantage(batch))
    assert first_tokens(result.columns["advantages"]) == [1, 0, 0, 0, 4, 0, 0, 0, 2]
    assert [row for row, mask in enumerate(result.columns["response_mask"].rows()) if not mask.any()] == [1, 2, 3, 5, 6]
    assert result.metrics["missing_rewards"].value == 5 and result.metrics["baseline_reward"] == Mean(1, 4)


def test_a_critic_learns_nothing_of_a_missing_row_and_whitening_leaves_it_out() -> None:
    result = as_result(gae(BATCH, gamma=1.0, lam=1.0))
    assert first_tokens(result.columns["returns"]) == [1, 0, 3, 0, 5, 0, 0, 0, 2]
    assert [row for row, mask in enumerate(result.columns["response_mask"].rows()) if not mask.any()] == LOST
    whitened = as_result(whiten(BATCH.with_columns(dict(result.columns)))).columns["advantages"]
    # 1, 3, 5, 0, 2: mean 2.2, variance (1.44 + 0.64 + 7.84 + 4.84 + 0.04) / 5 = 2.96.
    made = [1, 0, 3, 0, 5, 0, 0, 0, 2]
    expected = [(value - 2.2) / 2.96**0.5 if row not in LOST else 0 for row, value in enumerate(made)]
    np.testing.assert_allclose(first_tokens(whitened), expected, rtol=1e-5)


def test_a_missing_row_is_no_best_no_worst_and_makes_no_group_unequal() -> None:
    assert as_result(keep_best_and_worst(BATCH)).keep.tolist() == [0, 2, 7, 8]  # type: ignore[union-attr]
    assert as_result(drop_equal_groups(BATCH)).keep.tolist() == [0, 2, 7, 8]  # type: ignore[union-attr]
    assert as_result(best_of_group(BATCH)).keep.tolist() == [2, 4, 8]  # type: ignore[union-attr]
    dropped = as_result(drop_missing(BATCH))
    assert dropped.keep.tolist() == [0, 2, 4, 7, 8]  # type: ignore[union-attr]
    assert dropped.metrics["missing_rewards"].value == 4


def test_what_is_made_of_a_missing_reward_is_missing() -> None:
    for op, arguments in (
        (clip_rewards, {"low": 0.5, "high": 2}),
        (penalise_cut_responses, {"penalty": 1.0}),
        (whiten_rewards, {}),
    ):
        rewards = as_result(op(BATCH, **arguments)).columns["rewards"].values
        assert np.flatnonzero(is_missing(rewards)).tolist() == LOST and np.isfinite(np.delete(rewards, LOST)).all()


def test_a_step_in_which_all_are_missing_reports_no_reward_and_no_nan() -> None:
    batch = batch_of([MISSING, MISSING], [0, 0], baseline_rewards=Column.dense([0, 0], np.float32))
    for op in (grpo_advantage, rloo_advantage, remax_advantage, lambda rows: gae(rows, gamma=1.0, lam=1.0)):
        result = as_result(op(batch))  # type: ignore[operator]
        assert not result.columns["response_mask"].values.any() and not result.columns["advantages"].values.any()
        assert "reward" not in result.metrics and result.metrics["missing_rewards"].value == 2
        assert all(np.isfinite(metric.value) for metric in result.metrics.values())
    assert len(as_result(best_of_group(batch)).keep) == 0  # type: ignore[arg-type]


def test_ties_are_counted() -> None:
    batch = batch_of([1, 1, 0, 2, 1], [0, 0, 0, 1, 1])
    assert as_result(keep_best_and_worst(batch)).metrics["ties"] == Mean(1, 2)
    assert as_result(best_of_group(batch)).metrics["ties"] == Mean(1, 2)


def test_a_reward_that_failed_is_missing_where_that_was_asked_for() -> None:
    batch = Batch({"response": Column.strings(["a", "b", "c"])})
    result = reward_columns("mine", batch, [{"reward": 2.0}, "raised ValueError", {"reward": 4.0}], float(MISSING))
    assert is_missing(result.columns["rewards"].values).tolist() == [False, True, False]
    assert result.metrics["failed_rows"].value == 1 and result.metrics["reward"] == Mean(6.0, 2.0)
    nothing = reward_columns("mine", batch, ["raised"] * 3, float(MISSING))
    assert "reward" not in nothing.metrics and nothing.metrics["failed_rows"].value == 3


def test_an_op_that_takes_no_missing_rewards_says_what_to_do() -> None:
    from rlhf_dist.transforms.columns import numbers

    with pytest.raises(ValueError, match=r"missing rewards \(4 of 9 rows\).*drop_missing\(batch\)"):
        numbers(BATCH, "rewards")


def test_an_op_that_does_not_say_that_it_takes_missing_numbers_is_given_none() -> None:
    """A number that nobody knows is above nothing: a comparison would make a wrong response of it."""
    with pytest.raises(ValueError, match=r"mine reads column 'rewards', which is missing in 4 of 9 rows.*drop_missing"):
        refuse_missing("mine", BATCH, ("group_id", "rewards"))
    with pytest.raises(ValueError, match=r"rewards\)$"):
        refuse_missing("the loss of actor.update_actor", BATCH, ("rewards",), can_declare=False)
    refuse_missing("mine", BATCH, ("group_id", "values", "response_mask"))
    refuse_missing("mine", BATCH.take(np.empty(0, np.int64)), ("rewards",))


def test_a_run_ends_at_such_an_op_and_goes_on_past_one_that_takes_them() -> None:
    failing = {"reward.function": "tests.recipes.rules:fails_on_even_length", "reward.failed_reward": "missing"}
    with pytest.raises(CheckFailed, match="right_and_wrong reads column 'rewards', which is missing in"):
        check_recipe("oreal", both_ways=False, **{"algorithm.samples_per_prompt": 4, **failing})
    with pytest.raises(CheckFailed, match="loss of actor.update_actor reads column 'rewards', which is missing in"):
        check_recipe("sample_pairs", both_ways=False, **failing)  # pairs are compared in the loss
    steps = check_recipe("surrogates/nft", both_ways=False, steps=1, **failing)
    assert steps[-1]["reward/failed_rows"] == steps[-1]["response_advantage/missing_rewards"] > 0
