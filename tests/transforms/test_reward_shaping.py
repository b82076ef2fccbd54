"""Links of a chain from scores to rewards, each worked by hand, each with a missing reward."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rlhf_dist.algorithms.shaping import against_reference, combined, log_sigmoid, overlong_penalty
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import as_result
from rlhf_dist.metrics import Mean
from rlhf_dist.missing import MISSING, is_missing
from rlhf_dist.reward_statistics import RewardStatistics
from rlhf_dist.transforms import (
    combine_rewards,
    penalise_overlong,
    rewards_against_reference,
    whiten_rewards_by_prompt,
)


def column(*values: Any) -> Column:
    return Column(np.array(values, dtype=np.float32))


@pytest.mark.parametrize(
    ("how", "coef", "expected"),
    [
        # Scores 1, 2, 6: mean 3, variance (4 + 1 + 9) / 3, least 1. Scores 2, 2, 2: all 2.
        ("mean", 0.0, [3, 2]),
        ("median", 0.0, [2, 2]),
        ("wco", 0.0, [1, 2]),
        ("uwo", 0.3, [3 - 0.3 * 14 / 3, 2]),
        ("mean_std", 0.5, [3 - 0.5 * math.sqrt(14 / 3), 2]),
        ("nominal_worst", 0.5, [1, 2]),
        ("weighted", 0.0, [2 * 1 - 1 * 2 + 0.5 * 6, 3]),
    ],
)
def test_scores_become_one_reward(how: Any, coef: float, expected: list[float]) -> None:
    batch = Batch({"a": column(1, 2, 0), "b": column(2, 2, MISSING), "c": column(6, 2, 0)})
    result = as_result(combine_rewards(batch, scores=("a", "b", "c"), how=how, coef=coef, weights=(2, -1, 0.5)))
    rewards = result.columns["rewards"].values
    np.testing.assert_allclose(rewards[:2], expected, rtol=1e-6)
    assert is_missing(rewards).tolist() == [False, False, True]
    assert result.metrics["missing_rewards"].value == 1
    assert result.metrics["score_variance"].value == pytest.approx(7 / 3)
    assert combine_rewards.read_of({"scores": ("a", "b")})[0] == ("a", "b")


def test_what_cannot_be_combined_is_said() -> None:
    with pytest.raises(ValueError, match="a weight for each of 2 scores, got 1"):
        combined(np.zeros((2, 3), dtype=np.float32), "weighted", weights=[1.0])
    with pytest.raises(ValueError, match="mean, median, wco.*got 'most'"):
        combined(np.zeros((2, 3), dtype=np.float32), "most")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the columns"):
        combine_rewards(Batch({"rewards": column(1)}), scores=())


def test_rewards_against_those_of_a_reference_answer() -> None:
    batch = Batch({"rewards": column(2, 1, MISSING, 0), "reference_rewards": column(1, 1, 1, MISSING)})

    def shaped(**settings: Any) -> Any:
        return as_result(rewards_against_reference(batch, **settings))

    assert shaped(shape="delta").columns["rewards"].values[:2].tolist() == [1, 0]
    # 1 / (1 + e^-1) = 0.7310586 and 1/2; the logarithms of these.
    np.testing.assert_allclose(shaped().columns["rewards"].values[:2], [0.7310586, 0.5], rtol=1e-6)
    np.testing.assert_allclose(
        shaped(shape="log_sigmoid").columns["rewards"].values[:2], [-0.3132617, -0.6931472], rtol=1e-6
    )
    np.testing.assert_allclose(shaped(scale=2.0).columns["rewards"].values[:1], [1 / (1 + math.exp(-2))], rtol=1e-6)
    assert is_missing(shaped().columns["rewards"].values).tolist() == [False, False, True, True]
    assert shaped().metrics["better_than_reference"] == Mean(1, 2) and shaped().metrics["missing_rewards"].value == 2


def test_sigmoids_hold_at_both_ends_and_add_to_one() -> None:
    x = np.array([-1e4, -30, -1, 0, 1, 30, 1e4])
    assert np.isfinite(log_sigmoid(x)).all() and log_sigmoid(x)[0] == -1e4 and log_sigmoid(x)[-1] == 0
    zero = np.zeros(7, dtype=np.float32)
    up = against_reference(x.astype(np.float32), zero, "sigmoid")
    np.testing.assert_allclose(up + up[::-1], 1, rtol=1e-6)


def test_daposs_penalty_rises_over_the_last_tokens() -> None:
    # Longest 10, slack 0.4: 0 to 6 tokens, then a quarter for each.
    lengths = np.array([0, 6, 7, 9, 10, 12])
    np.testing.assert_allclose(overlong_penalty(lengths, 10, 0.4), [0, 0, -0.25, -0.75, -1, -1], rtol=1e-6)
    batch = Batch({"rewards": column(1, MISSING), "response_mask": Column.ragged([[1] * 8, [1] * 10], dtype="uint8")})
    result = as_result(penalise_overlong(batch, longest=10, slack=0.4, coef=2.0))
    assert result.columns["rewards"].values[0] == 0.0 and is_missing(result.columns["rewards"].values)[1]
    assert result.metrics["overlong"] == Mean(1.0, 1.0)
    for longest, slack in ((10, 0.0), (10, 1.5), (0, 0.5)):
        with pytest.raises(ValueError, match="0 < slack <= 1"):
            overlong_penalty(lengths, longest, slack)


def test_rewards_by_prompt_have_mean_0_and_deviation_1() -> None:
    group = Column.dense([7, 7, 7, 2, 2, 5], np.int64)
    batch = Batch({"rewards": column(1, 5, MISSING, 3, 3, 4), "group_id": group})
    rewards = as_result(whiten_rewards_by_prompt(batch)).columns["rewards"].values
    np.testing.assert_allclose(np.delete(rewards, 2), [-1, 1, 0, 0, 0], rtol=1e-5)
    assert is_missing(rewards)[2]
    centred = as_result(whiten_rewards_by_prompt(batch, scale=False)).columns["rewards"].values
    np.testing.assert_allclose(np.delete(centred, 2), [-2, 2, 0, 0, 0], rtol=1e-6)


def test_running_statistics_are_those_of_all_rewards_so_far() -> None:
    statistics = RewardStatistics()
    values = statistics.initial(None)
    given: list[float] = []
    for rewards in ([1.0, 3.0], [], [5.0, 5.0, 9.0]):
        batch = Batch({"rewards": column(*rewards, MISSING)})
        values, result = statistics.normalise(values, batch)
        given += rewards
        found = result.columns["rewards"].values
        assert is_missing(found).tolist() == [*[False] * len(rewards), True]
        np.testing.assert_allclose(found[:-1], (np.array(rewards) - np.mean(given)) / np.std(given), rtol=1e-6)
    assert values["count"] == 5 and values["mean"] == pytest.approx(4.6)


def test_the_first_reward_of_a_run_has_no_deviation_to_divide_by() -> None:
    statistics = RewardStatistics()
    batch = Batch({"rewards": column(4.0)})
    _, result = statistics.normalise(statistics.initial(None), batch)
    assert result.columns["rewards"].values.tolist() == [0.0]
