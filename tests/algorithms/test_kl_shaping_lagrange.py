"""KL estimators, reward shaping, multipliers: by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.algorithms import adapted_kl_coef, combined_advantages, updated_log_multiplier
from rlhf_dist.algorithms.kl import k1, k2, k3, kl
from rlhf_dist.algorithms.shaping import centred, clipped, kl_penalty, place_terminal


def test_kl_estimators_by_hand_on_numpy_and_tensors() -> None:
    p, q = np.array([-1.0, -2.0]), np.array([-1.5, -1.0])
    expected = {"k1": [0.5, -1.0], "k2": [0.125, 0.5], "k3": [math.exp(-0.5) - 0.5, math.e - 2]}
    for name, numbers in expected.items():
        np.testing.assert_allclose(kl(p, q, name), numbers)  # type: ignore[arg-type]
        tensor = kl(torch.tensor(p), torch.tensor(q), name)  # type: ignore[arg-type]
        np.testing.assert_allclose(tensor.numpy(), numbers)
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl(p, q, "k4")  # type: ignore[arg-type]


def test_k1_and_k3_are_unbiased() -> None:
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.3, 0.1])
    exact = (p * np.log(p / q)).sum()
    assert (p * k1(np.log(p), np.log(q))).sum() == pytest.approx(exact)
    assert (p * k3(np.log(p), np.log(q))).sum() == pytest.approx(exact)


def test_the_gradient_of_k2_is_the_gradient_of_the_kl() -> None:
    logits = torch.tensor([0.1, -0.4, 0.7], dtype=torch.float64, requires_grad=True)
    log_q = torch.log_softmax(torch.tensor([0.5, 0.0, 0.2], dtype=torch.float64), 0)
    log_p = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits, retain_graph=True)
    (estimate,) = torch.autograd.grad((log_p.exp().detach() * k2(log_p, log_q)).sum(), logits)
    torch.testing.assert_close(estimate, exact)


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_k3_is_finite_and_not_negative(p: float, q: float) -> None:
    value = k3(np.array([p], dtype=np.float32), np.array([q], dtype=np.float32))
    assert np.isfinite(value).all() and value[0] >= 0


def test_k3_of_close_log_probs_is_d_squared_over_2_and_not_rounding() -> None:
    # exp(d) - 1 - d in float32 is -6e-8 at d = 1e-4, where d^2 / 2 is 5e-9.
    d = np.array([1e-4, -1e-4, 1e-3], dtype=np.float32)
    for value in (k3(np.zeros_like(d), d), k3(torch.zeros(3), torch.from_numpy(d)).numpy()):
        np.testing.assert_allclose(value, d.astype(np.float64) ** 2 / 2, rtol=1e-3)


def test_k3_pulls_a_token_back_however_much_more_the_policy_likes_it() -> None:
    # d = -25: e^-25 - 1 + 25 = 24; the gradient by log pi is 1 - e^d. d = 25 counts as 20, without a gradient.
    log_probs = torch.tensor([-1.0, -26.0], dtype=torch.float64, requires_grad=True)
    value = k3(log_probs, torch.tensor([-26.0, -1.0], dtype=torch.float64))
    torch.testing.assert_close(value.detach(), torch.tensor([24 + math.exp(-25), math.exp(20) - 21]).double())
    (gradient,) = torch.autograd.grad(value.sum(), log_probs)
    torch.testing.assert_close(gradient, torch.tensor([1 - math.exp(-25), 0.0]).double())


def test_a_cap_cuts_the_estimate_and_its_gradient_and_is_off_by_default() -> None:
    log_probs = torch.tensor([-1.0, -21.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-2.0, -1.0], dtype=torch.float64)  # d = -1: e^-1; d = 20: 4.85e8
    inside, capped = math.exp(-1), kl(log_probs, ref, "k3", 10.0)
    torch.testing.assert_close(capped.detach(), torch.tensor([inside, 10.0]).double())
    (gradient,) = torch.autograd.grad(capped.sum(), log_probs)
    torch.testing.assert_close(gradient, torch.tensor([1 - math.exp(-1), 0.0]).double())
    assert kl(log_probs, ref)[1] > 4.8e8
    assert kl(np.array([-9.0]), np.array([-1.0]), "k1", 5.0).tolist() == [-5.0], "k1 is cut on both sides"
    assert kl(np.array([-1.0, -3.0]), np.array([-2.0, -1.0]), "abs").tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="cap must be > 0"):
        kl(np.array([-9.0]), np.array([-1.0]), "k3", -1.0)


def test_adapted_kl_coef_follows_the_measured_kl_with_a_bounded_step() -> None:
    assert adapted_kl_coef(0.1, 6.6, target=6.0) == pytest.approx(0.1 * 1.01)
    assert adapted_kl_coef(0.1, 100.0, target=6.0) == pytest.approx(0.1 * 1.02)
    assert adapted_kl_coef(0.1, 0.0, target=6.0) == pytest.approx(0.1 * 0.98)
    with pytest.raises(ValueError, match="finite number of nats, got nan"):
        adapted_kl_coef(0.1, math.nan, target=6.0)


def test_terminal_reward_goes_to_the_last_counted_token() -> None:
    offsets, mask = np.array([0, 3, 3, 5, 6]), np.array([1, 1, 0, 1, 1, 0])
    placed = place_terminal(np.array([2, 9, 3, 7], dtype=np.float32), offsets, mask)
    assert placed.tolist() == [0, 2, 0, 0, 3, 0]


def test_kl_penalty_clipping_and_centring() -> None:
    p, q = np.array([-1, -5], dtype=np.float32), np.array([-2, 0], dtype=np.float32)
    assert kl_penalty(p, q, np.array([1, 0]), 0.5).tolist() == [-0.5, 0.0]
    assert kl_penalty(p, q, np.array([1, 0]), 0.5, "k2").tolist() == [-0.25, 0.0]
    assert kl_penalty(p, q, np.array([1, 1]), 0.5, "k2", 2.0).tolist() == [-0.25, -1.0]
    assert clipped(np.array([-9, 0, 9], dtype=np.float32), -1, 2).tolist() == [-1, 0, 2]
    assert centred(np.array([1, 2], dtype=np.float32), np.array([1, 0.5])).tolist() == [0, 1.5]
    with pytest.raises(ValueError, match="low <= high"):
        clipped(p, 1, -1)


def test_the_multiplier_grows_over_the_limit_and_shrinks_under_it() -> None:
    # ln 2 + 0.1 * 2 * (5 - 2)
    assert updated_log_multiplier(math.log(2), 5.0, limit=2.0, lr=0.1) == pytest.approx(math.log(2) + 0.6)
    assert updated_log_multiplier(0.0, 1.0, limit=2.0, lr=0.1) == pytest.approx(-0.1)
    assert updated_log_multiplier(0.0, 1e9, limit=0.0, lr=1.0, largest=5.0) == pytest.approx(math.log(5))
    shrunk = updated_log_multiplier(0.0, -1e9, limit=0.0, lr=1.0)
    assert math.exp(shrunk) == pytest.approx(1e-30), "positive as a float, however large the step"
    with pytest.raises(ValueError, match="finite"):
        updated_log_multiplier(0.0, math.nan, limit=0.0, lr=0.1)


def test_combined_advantages() -> None:
    combined = combined_advantages(np.array([4], dtype=np.float32), np.array([1], dtype=np.float32), 3.0)
    assert combined.tolist() == [0.25] and combined.dtype == np.float32
    with pytest.raises(ValueError, match=">= 0"):
        combined_advantages(combined, combined, -1.0)
    with pytest.raises(ValueError, match="finite, got inf"):
        combined_advantages(combined, combined, math.inf)
