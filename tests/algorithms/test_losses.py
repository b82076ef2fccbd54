"""Each loss against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_dist.algorithms import bradley_terry, dpo, ipo, nll, policy_gradient, ppo_clip, simpo, value_clip
from tests.algorithms.rows import make_rows, model, tokens


def sigmoid_loss(x: float) -> float:
    return math.log(1 + math.exp(-x))


def ratio_rows(ratios: list[float], advantages: list[float], lengths: list[int] | None = None, **columns):
    lengths = lengths or [len(ratios)]
    zeros = torch.zeros(len(ratios), dtype=torch.float64)
    rows = make_rows(
        lengths,
        list(range(len(lengths))),
        torch.ones(len(ratios), dtype=torch.float64),
        {"old_log_probs": zeros, "advantages": tokens(*advantages), **columns},
    )
    return model(log_probs=tokens(*map(math.log, ratios))), rows


def test_ppo_clip_takes_the_worse_of_the_plain_and_the_clipped_objective() -> None:
    output, rows = ratio_rows([1.5, 1.5, 0.5, 0.5, 1.1], [1, -1, 1, -1, 2])
    loss, metrics = ppo_clip(0.2)(output, rows)
    torch.testing.assert_close(loss, tokens(-1.2, 1.5, -0.5, 0.8, -2.2))
    torch.testing.assert_close(metrics["clip_fraction"], tokens(1, 0, 0, 1, 0))
    torch.testing.assert_close(metrics["ratio"], tokens(1.5, 1.5, 0.5, 0.5, 1.1))
    # KL(old || new) by k3 with d = log ratio.
    torch.testing.assert_close(metrics["old_kl_k3"][0], torch.tensor(0.5 - math.log(1.5), dtype=torch.float64))


def test_ppo_clip_higher_and_dual_clip() -> None:
    output, rows = ratio_rows([1.5, 4.0, 1.05], [1, -1, -1])
    loss, _ = ppo_clip(0.2, clip_high=0.28, dual_clip=3.0)(output, rows)
    torch.testing.assert_close(loss, tokens(-1.28, 3.0, 1.05))


def test_ppo_clip_average_over_rows_and_with_a_constant_divisor() -> None:
    output, rows = ratio_rows([1.0, 1.0, 1.0], [1, 3, 5], lengths=[2, 1])
    torch.testing.assert_close(ppo_clip(average="rows")(output, rows)[0], tokens(-2, -5))
    torch.testing.assert_close(ppo_clip(average="rows", row_divisor=10)(output, rows)[0], tokens(-0.4, -0.5))


def test_sequence_ratio_is_the_geometric_mean_of_the_row() -> None:
    output, rows = ratio_rows([2.0, 0.5, 1.1, 1.21], [1, 1, 1, 1], lengths=[2, 2])
    loss, metrics = ppo_clip(0.5, ratio="sequence", average="rows")(output, rows)
    torch.testing.assert_close(loss, tokens(-1.0, -(1.1**1.5)))
    torch.testing.assert_close(metrics["ratio"], tokens(1.0, 1.1**1.5))


def test_a_sequence_ratio_may_keep_each_tokens_own_gradient() -> None:
    # Ratios 2 and 0.5: geometric mean 1. A_1 = 3, A_2 = 5: the mean's gradient is shared, -(3 + 5) / 2 each.
    gradients = []
    for ratio in ("sequence", "sequence_token"):
        output, rows = ratio_rows([2.0, 0.5], [3, 5])
        assert output.log_probs is not None
        loss, _ = ppo_clip(ratio=ratio)(model(log_probs=output.log_probs.requires_grad_()), rows)  # type: ignore[arg-type]
        gradients += torch.autograd.grad(loss.sum(), output.log_probs)
    shared, own = gradients
    torch.testing.assert_close(shared, tokens(-4, -4))
    torch.testing.assert_close(own, tokens(-3, -5))


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.3), ("k2", 0.045), ("k3", math.exp(-0.3) - 1 + 0.3)])
def test_ppo_clip_adds_kl_and_takes_off_entropy(estimator: str, expected: float) -> None:
    loss_function = ppo_clip(kl_coef=0.1, kl_estimator=estimator, entropy_coef=0.01)  # type: ignore[arg-type]
    assert loss_function.reads == ("old_log_probs", "advantages", "ref_log_probs")
    assert loss_function.outputs == ("log_probs", "entropy")
    output, rows = ratio_rows([1.0], [2.0], ref_log_probs=tokens(-0.3))
    loss, metrics = loss_function(model(log_probs=output.log_probs, entropy=tokens(5.0)), rows)
    torch.testing.assert_close(loss, tokens(-2 + 0.1 * expected - 0.05))
    torch.testing.assert_close(metrics["ref_kl" if estimator == "k1" else f"ref_kl_{estimator}"], tokens(expected))
    torch.testing.assert_close(metrics["ref_kl"], tokens(0.3))


def test_ppo_clip_reads_only_what_it_needs() -> None:
    assert ppo_clip().reads == ("old_log_probs", "advantages")
    assert ppo_clip().outputs == ("log_probs",)


def test_ppo_clip_is_finite_where_uncounted_tokens_hold_absurd_numbers() -> None:
    for ratio in ("token", "sequence"):
        log_probs = tokens(-1.0, -500.0).requires_grad_()
        columns = {"old_log_probs": tokens(-1.0, math.inf), "advantages": tokens(1.0, 0.0)}
        rows = make_rows([2], [0], tokens(1, 0), columns)
        loss, metrics = ppo_clip(ratio=ratio)(model(log_probs=log_probs), rows)  # type: ignore[arg-type]
        (loss * rows.mask).sum().backward()
        torch.testing.assert_close(log_probs.grad, tokens(-1.0, 0.0))
        assert all(value.isfinite().all() for value in metrics.values())


def test_policy_gradient_of_a_response_is_minus_advantage_times_its_log_prob() -> None:
    rows = make_rows([2, 1], [0, 1], tokens(1, 1, 1), {"advantages": tokens(2, 2, -1)})
    output = model(log_probs=tokens(-0.5, -1.0, -3.0))
    torch.testing.assert_close(policy_gradient()(output, rows)[0], tokens(1.0, 2.0, -3.0))
    torch.testing.assert_close(policy_gradient(average="rows", row_divisor=1)(output, rows)[0], tokens(3.0, -3.0))


def test_value_clip_takes_the_larger_error() -> None:
    columns = {"values": tokens(0, 0, 0), "returns": tokens(1, 1, -1)}
    rows = make_rows([3], [0], tokens(1, 1, 1), columns)
    output = model(values=tokens(0.8, 0.1, 0.5))
    loss, metrics = value_clip(0.2)(output, rows)
    # Row 0: 0.8 is clipped to 0.2, error 0.64 > 0.04. Row 1: inside. Row 2: moved away, the plain error is larger.
    torch.testing.assert_close(loss, tokens(0.32, 0.405, 1.125))
    torch.testing.assert_close(metrics["value_clip_fraction"], tokens(1, 0, 0))
    torch.testing.assert_close(value_clip(0)(output, rows)[0], tokens(0.02, 0.405, 1.125))
    assert value_clip(0).reads == ("returns",)


def test_ppo_clip_on_policy_equals_ppo_clip_at_the_old_policy() -> None:
    log_probs, advantages = tokens(-1, -2, -3).requires_grad_(), tokens(1, -0.5, 2)
    columns = {"old_log_probs": log_probs.detach(), "advantages": advantages, "rollout_log_probs": tokens(-1, -2.5, -3)}
    rows = make_rows([2, 1], [0, 1], tokens(1, 1, 1), columns)
    loss, metrics = ppo_clip(0.2, on_policy=True)(model(log_probs=log_probs), rows)
    expected, _ = ppo_clip(0.2)(model(log_probs=log_probs), rows)
    torch.testing.assert_close(loss, expected)
    for value in (loss, expected):
        torch.testing.assert_close(torch.autograd.grad(value.sum(), log_probs, retain_graph=True)[0], -advantages)
    torch.testing.assert_close(metrics["rollout_mismatch"], tokens(0, 0.5, 0))
    assert ppo_clip(on_policy=True).reads == ("rollout_log_probs", "advantages")


def test_nll_and_its_row_weights() -> None:
    rows = make_rows([2, 1], [0, 1], tokens(1, 1, 1), {"weight": tokens(0.5, 2.0)})
    output = model(log_probs=tokens(-1, -2, -3))
    torch.testing.assert_close(nll()(output, rows)[0], tokens(1, 2, 3))
    torch.testing.assert_close(nll(weighted=True)(output, rows)[0], tokens(0.5, 1, 6))
    torch.testing.assert_close(nll(average="rows")(output, rows)[0], tokens(1.5, 3))


def pair_rows(**columns: torch.Tensor):
    """Two pairs: chosen first in the one, last in the other; the last token of row 1 does not count."""
    label = torch.tensor([1, -1, -1, 1], dtype=torch.int8)
    return make_rows([2, 3, 1, 1], [7, 7, 9, 9], tokens(1, 1, 1, 1, 0, 1, 1), {"label": label, **columns})


PAIR_LOG_PROBS = tokens(-1, -2, -1, -1, -50, -3, -1)
PAIR_REF = tokens(-2, -2, -1, -0.5, 0, -3, -2)
# Log-ratios: rows 0..3 = 1, -0.5, 0, 1; delta = 1.5 and 1.


def test_dpo_by_hand() -> None:
    rows = pair_rows(ref_log_probs=PAIR_REF)
    loss, metrics = dpo(0.4)(model(log_probs=PAIR_LOG_PROBS), rows)
    torch.testing.assert_close(loss, tokens(sigmoid_loss(0.6), sigmoid_loss(0.4)))
    torch.testing.assert_close(metrics["margin"], tokens(0.6, 0.4))
    torch.testing.assert_close(metrics["accuracy"], tokens(1, 1))
    smooth, _ = dpo(0.4, label_smoothing=0.1)(model(log_probs=PAIR_LOG_PROBS), rows)
    torch.testing.assert_close(smooth[1], tokens(0.9 * sigmoid_loss(0.4) + 0.1 * sigmoid_loss(-0.4))[0])
    mean, _ = dpo(1.0, length_normalised=True)(model(log_probs=PAIR_LOG_PROBS), rows)
    torch.testing.assert_close(mean, tokens(sigmoid_loss(0.5 + 0.25), sigmoid_loss(1.0)))


def test_ipo_draws_the_log_ratios_half_an_inverse_tau_apart() -> None:
    loss, _ = ipo(0.5)(model(log_probs=PAIR_LOG_PROBS), pair_rows(ref_log_probs=PAIR_REF))
    torch.testing.assert_close(loss, tokens(0.25, 0.0))


def test_simpo_needs_no_reference() -> None:
    assert simpo().reads == ("label",)
    loss, _ = simpo(2.0, 0.5)(model(log_probs=PAIR_LOG_PROBS), pair_rows())
    # Means: -1.5 and -1; -1 and -3.
    torch.testing.assert_close(loss, tokens(sigmoid_loss(2 * -0.5 - 0.5), sigmoid_loss(2 * 2 - 0.5)))


def test_bradley_terry_compares_the_scores_of_a_pair() -> None:
    scores = tokens(2, 1, 3, 0.5)
    loss, metrics = bradley_terry()(model(scores=scores), pair_rows())
    torch.testing.assert_close(loss, tokens(sigmoid_loss(1.0), sigmoid_loss(-2.5)))
    torch.testing.assert_close(metrics["accuracy"], tokens(1, 0))
    margin = pair_rows(margin=tokens(0.5, 0.5, 0.0, 0.0))
    loss, _ = bradley_terry(use_margin=True, centre_coef=0.1)(model(scores=scores), margin)
    torch.testing.assert_close(loss, tokens(sigmoid_loss(0.5) + 0.9, sigmoid_loss(-2.5) + 0.1 * 3.5**2))


def test_a_group_that_is_no_pair_is_an_error() -> None:
    rows = make_rows([1, 1], [0, 0], tokens(1, 1), {"label": torch.tensor([1, 1]), "ref_log_probs": tokens(0, 0)})
    with pytest.raises(ValueError, match="exactly one row labelled"):
        dpo()(model(log_probs=tokens(-1, -1)), rows)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ppo_clip(0),
        lambda: ppo_clip(dual_clip=0.5),
        lambda: ppo_clip(average="batch"),  # type: ignore[arg-type]
        lambda: ppo_clip(row_divisor=3),
        lambda: value_clip(-1),
        lambda: dpo(0),
        lambda: dpo(label_smoothing=0.5),
        lambda: ipo(0),
    ],
)
def test_impossible_settings_are_refused(build) -> None:
    with pytest.raises(ValueError, match="must be|got"):
        build()


def test_averages_over_groups_and_over_rows_with_tokens() -> None:
    # Group 0: rows of 2 and 1 counted tokens, group 1: a row of 1 and one without any.
    rows = make_rows([2, 2, 1, 1], [0, 0, 1, 1], tokens(1, 1, 1, 0, 1, 0), {"advantages": tokens(1, 3, 5, 99, 7, 99)})
    output = model(log_probs=tokens(*[-1.0] * 6))
    # The loss of a token is its advantage here.
    groups, _ = policy_gradient(average="groups")(output, rows)
    torch.testing.assert_close(groups, tokens((1 + 3 + 5) / 3, 7))
    with_tokens, _ = policy_gradient(average="rows_with_tokens")(output, rows)
    torch.testing.assert_close(with_tokens, tokens(2, 5, 7, 0))
    with pytest.raises(ValueError, match="an average over rows"):
        policy_gradient(average="groups", row_divisor=2)


def test_sums_over_tokens_never_see_what_does_not_count() -> None:
    rows = make_rows([2, 1], [0, 1], tokens(1, 0, 1), {})
    absurd = tokens(2, math.nan, 5)
    torch.testing.assert_close(rows.sum_tokens(absurd), tokens(2, 5))
    torch.testing.assert_close(rows.mean_tokens(absurd), tokens(2, 5))


def test_ppo_clip_cuts_advantages() -> None:
    output, rows = ratio_rows([1.0, 1.0, 1.0], [5, -5, 1])
    torch.testing.assert_close(ppo_clip(advantage_clip=2.0)(output, rows)[0], tokens(-2, 2, -1))


def test_ppo_clip_may_take_the_ratio_to_the_policy_as_sampled() -> None:
    output, rows = ratio_rows([1.5, 0.5], [1, 1], rollout_log_probs=tokens(math.log(1.5), math.log(0.25)))
    loss_function = ppo_clip(old="sampled")
    assert loss_function.reads == ("rollout_log_probs", "advantages")
    loss, metrics = loss_function(output, rows)
    torch.testing.assert_close(loss, tokens(-1.0, -1.2))  # ratios 1 and 2, the second clipped
    torch.testing.assert_close(metrics["ratio"], tokens(1, 2))
    for wrong in ({"on_policy": True}, {"correction": "token"}):
        with pytest.raises(ValueError, match="it would count twice"):
            ppo_clip(old="sampled", **wrong)  # type: ignore[arg-type]


def test_a_kl_cap_bounds_loss_and_metric_and_the_mean_log_ratio_stands_beside() -> None:
    # pi is 20 nats below the reference at the first token, equal at the second.
    output, rows = ratio_rows([1.0, 1.0], [0, 0], ref_log_probs=tokens(20.0, 0.0))
    plain, reported = ppo_clip(kl_coef=1.0)(output, rows)
    assert plain[0] > 4.8e8 and reported["ref_kl_k3"][0] > 4.8e8
    torch.testing.assert_close(reported["ref_kl"], tokens(-20.0, 0.0))
    capped, metrics = ppo_clip(kl_coef=1.0, kl_cap=10.0)(output, rows)
    torch.testing.assert_close(capped, tokens(10.0, 0.0))
    torch.testing.assert_close(metrics["ref_kl_k3"], tokens(10.0, 0.0))
    torch.testing.assert_close(metrics["ref_kl"], tokens(-20.0, 0.0))


def test_value_loss_with_another_factor_and_average() -> None:
    rows = make_rows([2, 1], [0, 1], tokens(1, 1, 1), {"returns": tokens(1, 3, 2)})
    output = model(values=tokens(0, 0, 0))
    torch.testing.assert_close(value_clip(0, coef=1.0)(output, rows)[0], tokens(1, 9, 4))
    torch.testing.assert_close(value_clip(0, average="rows")(output, rows)[0], tokens(2.5, 2))


def test_ipo_over_mean_log_ratios() -> None:
    # Mean log-ratios of the rows: 0.5, -0.25, 0, 1; delta 0.75 and 1; drawn 1 / (2 * 0.5) = 1 apart.
    loss, _ = ipo(0.5, length_normalised=True)(model(log_probs=PAIR_LOG_PROBS), pair_rows(ref_log_probs=PAIR_REF))
    torch.testing.assert_close(loss, tokens(0.0625, 0.0))


def test_robust_dpo_is_unbiased_under_flipped_labels() -> None:
    rows, output = pair_rows(ref_log_probs=PAIR_REF), model(log_probs=PAIR_LOG_PROBS)
    robust = dpo(0.4, label_smoothing=0.1, smoothing="robust")
    loss, _ = robust(output, rows)
    expected = (0.9 * sigmoid_loss(0.4) - 0.1 * sigmoid_loss(-0.4)) / 0.8
    torch.testing.assert_close(loss[1], tokens(expected)[0])
    # A label flipped one time in ten: the mean is the loss of the right label.
    flipped_label = (0.9 * sigmoid_loss(-0.4) - 0.1 * sigmoid_loss(0.4)) / 0.8
    assert 0.9 * expected + 0.1 * flipped_label == pytest.approx(sigmoid_loss(0.4))
    with pytest.raises(ValueError, match="'conservative' or 'robust'"):
        dpo(smoothing="hard")  # type: ignore[arg-type]
