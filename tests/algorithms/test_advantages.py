"""Advantage formulas: by hand, and GAE against the textbook loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.algorithms.advantages import all_equal, gae, group_relative, leave_one_out, versus_baseline, whiten


def f32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_gae_by_hand() -> None:
    # One row of two tokens, gamma 0.5, lam 0.5:
    # delta_1 = 1 - 2 = -1; delta_0 = 0 + 0.5 * 2 - 1 = 0; A_0 = 0 + 0.25 * -1.
    advantages, returns = gae(f32(0, 1), f32(1, 2), np.array([0, 2]), np.array([1, 1]), 0.5, 0.5)
    np.testing.assert_allclose(advantages, [-0.25, -1.0])
    np.testing.assert_allclose(returns, [0.75, 1.0])
    assert advantages.dtype == returns.dtype == np.float32


def test_gae_with_lam_one_and_gamma_one_is_return_minus_value() -> None:
    advantages, returns = gae(f32(0, 0, 1, 5), f32(3, 4, 5, 1), np.array([0, 3, 3, 4]), np.ones(4), 1.0, 1.0)
    np.testing.assert_allclose(returns, [1, 1, 1, 5])
    np.testing.assert_allclose(advantages, [-2, -3, -4, 4])


def test_gae_steps_over_uncounted_tokens_and_their_rewards_go_to_the_action_before() -> None:
    # Tokens: uncounted, action, tool, tool, action. As if the row were the two actions, reward 7 at the first.
    offsets, mask = np.array([0, 5]), np.array([0, 1, 0, 0, 1])
    advantages, returns = gae(f32(100, 1, 2, 4, 3), f32(9, 1, 9, 9, 2), offsets, mask, 0.9, 0.8)
    expected = gae(f32(7, 3), f32(1, 2), np.array([0, 2]), np.ones(2), 0.9, 0.8)
    np.testing.assert_allclose(advantages, [0, expected[0][0], 0, 0, expected[0][1]], rtol=1e-6)
    np.testing.assert_allclose(returns, [0, expected[1][0], 0, 0, expected[1][1]], rtol=1e-6)


def naive_gae(rewards, values, mask, gamma, lam):
    """One row; t runs over counted tokens. An uncounted token's reward belongs to the counted one before it."""
    steps = [t for t in range(len(values)) if mask[t]]
    advantages, returns = [0.0] * len(values), [0.0] * len(values)
    later, next_value = 0.0, 0.0
    for place in range(len(steps) - 1, -1, -1):
        t = steps[place]
        end = steps[place + 1] if place + 1 < len(steps) else len(values)
        delta = sum(rewards[t:end]) + gamma * next_value - values[t]
        later = delta + gamma * lam * later
        advantages[t], returns[t], next_value = later, later + values[t], values[t]
    return advantages, returns


token = st.tuples(st.floats(-3, 3, width=32), st.floats(-3, 3, width=32), st.booleans())


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(token, max_size=6), max_size=6), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_equals_the_loop_of_the_paper(rows, gamma: float, lam: float) -> None:
    flat = [entry for row in rows for entry in row]
    offsets = np.cumsum([0, *map(len, rows)])
    rewards, values = f32(*(r for r, _, _ in flat)), f32(*(v for _, v, _ in flat))
    advantages, returns = gae(rewards, values, offsets, np.array([m for *_, m in flat], dtype=np.uint8), gamma, lam)
    expected_advantages, expected_returns = [], []
    for row in rows:
        a, r = naive_gae([x[0] for x in row], [x[1] for x in row], [x[2] for x in row], gamma, lam)
        expected_advantages += a
        expected_returns += r
    np.testing.assert_allclose(advantages, expected_advantages, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns, expected_returns, rtol=1e-4, atol=1e-5)


GROUPS = np.array([0, 1, 0, 1, 0])


def test_group_relative_takes_the_other_standard_deviations() -> None:
    rewards = f32(1, 5, 2, 5, 3)
    # Group 0 is 1, 2, 3: squares 2, over n - 1 = 2; group 1 is equal.
    np.testing.assert_allclose(group_relative(rewards, GROUPS, ddof=1), [-1, 0, 0, 0, 1], rtol=1e-5)
    # All rewards: mean 3.2, squares 4.84 + 3.24 + 1.44 + 3.24 + 0.04 = 12.8, over n = 5 or n - 1 = 4.
    for ddof, variance in ((0, 12.8 / 5), (1, 12.8 / 4)):
        found = group_relative(rewards, GROUPS, scale_over="batch", ddof=ddof)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, np.array([-1, 0, 0, 0, 1]) / math.sqrt(variance), rtol=1e-5)
    assert not group_relative(f32(4), np.array([0]), ddof=1).any(), "a group of one is 0, not NaN"
    assert not group_relative(f32(4), np.array([0]), ddof=1, scale_over="batch").any()


def test_group_relative_with_and_without_the_standard_deviation() -> None:
    rewards = f32(1, 5, 2, 5, 3)
    std = np.sqrt(2 / 3)
    np.testing.assert_allclose(group_relative(rewards, GROUPS), [-1 / std, 0, 0, 0, 1 / std], rtol=1e-5)
    np.testing.assert_allclose(group_relative(rewards, GROUPS, scale=False), [-1, 0, 0, 0, 1])
    assert all_equal(rewards, GROUPS).tolist() == [False, True]


@pytest.mark.parametrize("reward", [0.1, 1e30, -7.3])
@pytest.mark.parametrize("formula", [group_relative, leave_one_out])
def test_equal_rewards_give_exactly_zero(reward: float, formula) -> None:
    assert (formula(f32(*[reward] * 7), np.zeros(7, dtype=np.int64)) == 0).all()


def test_leave_one_out_by_hand() -> None:
    np.testing.assert_allclose(leave_one_out(f32(1, 5, 2, 6, 6), GROUPS), [1 - 4, -1, 2 - 3.5, 1, 6 - 1.5])
    assert leave_one_out(f32(4), np.array([0])) == 0


def test_versus_baseline() -> None:
    np.testing.assert_allclose(versus_baseline(f32(1, 0), f32(0.25, 1)), [0.75, -1])


def test_whiten_counts_only_counted_tokens() -> None:
    whitened = whiten(f32(1, 100, 3), np.array([1, 0, 1]))
    np.testing.assert_allclose(whitened, [-1, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(whiten(f32(1, 100, 3), np.array([1, 0, 1]), centre=False), [1, 0, 3], rtol=1e-6)


def test_whiten_without_centring_leaves_the_mean_where_it_is() -> None:
    # Mean 2.5, distances +-1.5 and +-0.5, variance 1.25: 2.5 -+ 1.5 / sqrt(1.25) and 2.5 -+ 0.5 / sqrt(1.25).
    kept = whiten(f32(1, 2, 3, 4, 99), np.array([1, 1, 1, 1, 0]), centre=False)
    np.testing.assert_allclose(kept, [1.1583592, 2.0527864, 2.9472136, 3.8416408, 0], rtol=1e-6)
    np.testing.assert_allclose([kept[:4].mean(), kept[:4].std()], [2.5, 1], rtol=1e-6)


def test_whiten_with_divisor_n_minus_1() -> None:
    # Squares 2.25 + 0.25 + 0.25 + 2.25 = 5; 5 / 3 in place of 5 / 4.
    expected = np.array([-1.5, -0.5, 0.5, 1.5]) / math.sqrt(5 / 3)
    np.testing.assert_allclose(whiten(f32(1, 2, 3, 4), np.ones(4), ddof=1), expected, rtol=1e-6)
    assert whiten(f32(7, 9), np.array([1, 0]), ddof=1).tolist() == [0, 0], "one entry has no spread, and no NaN"


@pytest.mark.parametrize("values", [[], [0.1, 0.1, 0.1], [5.0]])
def test_whiten_without_spread_is_zero_and_never_nan(values: list[float]) -> None:
    assert whiten(f32(*values), np.ones(len(values))).tolist() == [0.0] * len(values)


def test_nothing_in_nothing_out() -> None:
    empty, offsets, groups = f32(), np.array([0]), np.array([], dtype=np.int64)
    assert len(gae(empty, empty, offsets, empty, 1.0, 1.0)[0]) == 0
    assert len(group_relative(empty, groups)) == len(leave_one_out(empty, groups)) == 0
