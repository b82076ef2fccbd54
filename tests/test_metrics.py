"""Metrics combine to what the whole batch would give, however it was cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.metrics import ExplainedVariance, Largest, Mean, Spread, combine, reward_metrics


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), max_size=12), st.sets(st.integers(0, 12)))
def test_the_spread_of_shards_is_that_of_all_rewards(values: list[float], cuts: set[int]) -> None:
    # 1e5 away from 0: a sum of squares would have lost most of the digits in float32, and some in float64.
    rewards = (np.array(values) + 1e5).astype(np.float64)
    parts = np.split(rewards, sorted(cut for cut in cuts if cut <= len(values)))
    together = combine(reward_metrics(part) for part in parts)
    assert bool(together) == bool(values), "no rows have no mean"
    if values:
        assert together["reward_std"].value == pytest.approx(rewards.std(), abs=1e-7)
        assert together["reward"].value == pytest.approx(rewards.mean())


def test_by_hand() -> None:
    # 1, 3 | 5: mean 3, squares 4 + 0 + 4, over 3.
    assert (Spread.of(np.array([1.0, 3.0])) + Spread.of(np.array([5.0]))).value == pytest.approx((8 / 3) ** 0.5)
    assert combine([{"longest": Largest(4)}, {"longest": Largest(9)}, {"longest": Largest(0)}])["longest"].value == 9
    assert combine([{"share": Mean(1, 2)}, {"share": Mean(0, 6)}])["share"].value == 0.125


def test_explained_variance_of_shards_is_that_of_all() -> None:
    guess, target = np.array([0.0, 1.0, 2.0, 2.0]), np.array([0.0, 1.0, 3.0, 4.0])
    # target - guess = 0 0 1 2: variance 0.6875; target: variance 2.5.
    assert ExplainedVariance.of(guess, target).value == pytest.approx(1 - 0.6875 / 2.5)
    parts = [ExplainedVariance.of(guess[:1], target[:1]), ExplainedVariance.of(guess[1:], target[1:])]
    assert (parts[0] + parts[1]).value == pytest.approx(1 - 0.6875 / 2.5)
    assert ExplainedVariance.of(np.zeros(3), np.ones(3)).value == 1.0, "a constant offset explains a constant"
    assert ExplainedVariance.of(np.arange(3.0), np.ones(3)).value == 0.0
