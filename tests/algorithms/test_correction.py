"""Importance correction against numbers computed by hand: rho = pi_old / pi_rollout."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_dist.algorithms import policy_gradient, ppo_clip
from tests.algorithms.rows import make_rows, model, tokens

RHO = [0.25, 1.0, 3.0, 1.5]
"""Two rows of two tokens: products 0.25 and 4.5."""


def batch(mask: list[float] | None = None):
    old = torch.full((4,), math.log(0.3), dtype=torch.float64)
    columns = {
        "old_log_probs": old,
        "rollout_log_probs": old - tokens(*map(math.log, RHO)),
        "advantages": tokens(1, 1, -1, 2),
    }
    rows = make_rows([2, 2], [0, 1], tokens(*(mask or [1, 1, 1, 1])), columns)
    return model(log_probs=old.clone().requires_grad_()), rows


WEIGHTS = {
    "none": [1.0, 1.0, 1.0, 1.0],
    "token": [0.25, 1.0, 2.0, 1.5],
    "sequence": [0.25, 0.25, 2.0, 2.0],
    "masked": [0.0, 1.0, 0.0, 1.5],
}


@pytest.mark.parametrize(("correction", "weights"), WEIGHTS.items())
def test_the_policy_loss_is_weighted_and_the_weight_has_no_gradient(correction: str, weights: list[float]) -> None:
    output, rows = batch()
    loss, metrics = ppo_clip(correction=correction, correction_cap=2.0)(output, rows)  # type: ignore[arg-type]
    expected = -tokens(*weights) * rows["advantages"]  # the ratio to pi_old is 1
    torch.testing.assert_close(loss.detach(), expected)
    assert output.log_probs is not None
    (gradient,) = torch.autograd.grad(loss.sum(), output.log_probs)
    torch.testing.assert_close(gradient, expected)
    if correction != "none":
        torch.testing.assert_close(metrics["correction"], tokens(*weights))
        torch.testing.assert_close(metrics["rollout_ratio"], tokens(*RHO))
        torch.testing.assert_close(metrics["rollout_ratio_error"], tokens(0.75, 0, 2, 0.5))


def test_a_policy_that_is_trained_as_it_is_sampled_takes_its_own_log_probs() -> None:
    output, rows = batch()
    loss, _ = ppo_clip(on_policy=True, correction="token")(output, rows)
    torch.testing.assert_close(loss.detach(), -tokens(0.25, 1, 2, 1.5) * rows["advantages"])
    plain, _ = policy_gradient(correction="token")(output, rows)
    torch.testing.assert_close(plain.detach(), -tokens(0.25, 1, 2, 1.5) * rows["advantages"] * math.log(0.3))


def test_tokens_that_do_not_count_are_no_part_of_a_sequences_weight() -> None:
    output, rows = batch(mask=[0, 1, 0, 1])
    _, metrics = ppo_clip(correction="sequence", correction_cap=8.0)(output, rows)
    torch.testing.assert_close(metrics["correction"], tokens(1.0, 1.0, 1.5, 1.5))


def test_responses_are_left_out_by_the_geometric_mean_of_their_tokens() -> None:
    # Of 1/4 and 1 it is 1/2, of 3 and 1.5 it is sqrt(4.5) = 2.12; of the tokens that count alone 1 and 1.5.
    for mask, cap, weights in (
        ([1.0] * 4, 2.1, (1, 1, 0, 0)),
        ([1.0] * 4, 1.9, (0, 0, 0, 0)),
        ([1.0] * 4, 2.2, (1, 1, 1, 1)),
        ([0.0, 1.0, 0.0, 1.0], 1.6, (1, 1, 1, 1)),
    ):
        output, rows = batch(mask=mask)
        _, metrics = ppo_clip(correction="geometric", correction_cap=cap)(output, rows)
        torch.testing.assert_close(metrics["correction"], tokens(*weights))


def test_only_a_correction_reads_what_was_sampled() -> None:
    assert "rollout_log_probs" not in ppo_clip().reads and "rollout_log_probs" not in policy_gradient().reads
    assert "rollout_log_probs" in ppo_clip(correction="masked").reads
    assert "rollout_log_probs" in policy_gradient(correction="token").reads


def test_a_cap_below_one_and_an_unknown_word_are_refused() -> None:
    with pytest.raises(ValueError, match="correction_cap must be at least 1"):
        ppo_clip(correction="token", correction_cap=0.5)
    with pytest.raises(
        ValueError, match="correction must be one of none, token, sequence, masked, geometric, got 'tis'"
    ):
        policy_gradient(correction="tis")  # type: ignore[arg-type]
