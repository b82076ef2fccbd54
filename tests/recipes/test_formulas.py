"""What recipes bring of their own, against values worked by hand from the papers' formulas."""

from __future__ import annotations

from math import exp, log, sqrt

import numpy as np
import pytest
import torch

from recipes.online_preference.nash_md import win_advantage
from recipes.online_preference.self_rewarding import ADDITIVE, SelfRewarding
from recipes.policy_gradient.adaptive_kl import AdaptiveKL, KlCoefficient
from recipes.policy_gradient.chord import expert_nll, mu_at
from recipes.policy_gradient.fine_grained_rlhf import rewards_of_segments
from recipes.policy_gradient.greso import GRESO, History
from recipes.policy_gradient.ma_rlhf import segment_gae
from recipes.policy_gradient.oreal import copy_and_avoid, outcome_cross_entropy, right_and_wrong
from recipes.policy_gradient.pf_ppo import filtered
from recipes.preference.hypo import kl_of_samples
from recipes.preference.kto import kl_of, kto_loss, mismatched
from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.batch import Batch, Column
from rlhf_dist.parsers import Number
from rlhf_dist.prompt_template import Template
from rlhf_dist.transforms import gae
from tests.recipes.rows import gradient


def ragged(*rows: list[float], dtype: str = "float32") -> Column:
    return Column.ragged([np.array(row, dtype) for row in rows], dtype=dtype)


def micro_batch(columns: dict[str, list[float]], lengths: list[int]) -> Rows:
    return Rows(
        columns={name: torch.tensor(values) for name, values in columns.items()},
        mask=torch.ones(sum(lengths)),
        row_of_token=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        group_of_row=torch.arange(len(lengths)),
        num_groups=len(lengths),
    )


def test_ktos_baseline_is_the_mean_log_ratio_of_mismatched_rows_and_never_negative() -> None:
    batch = Batch({"response_ids": ragged([1, 2], [3], [4, 5], dtype="int32")})
    made = mismatched(batch)
    assert [row.tolist() for row in made.columns["response_ids"].rows()] == [[3], [4, 5], [1, 2]]
    assert made.parent is not None and made.parent.tolist() == [0, 1, 2]
    own = Batch({"group_id": Column(np.arange(2))})
    # Row sums of old - ref: (-1 - -3) = 2 and (-4 - -3) = -1; their mean is 0.5.
    others = Batch({"old_log_probs": ragged([-0.5, -0.5], [-4]), "ref_log_probs": ragged([-1, -2], [-3])})
    np.testing.assert_allclose(kl_of(own, others).columns["kl"].values, [0.5, 0.5])
    turned = others.rename(old_log_probs="ref_log_probs", ref_log_probs="old_log_probs")
    np.testing.assert_allclose(kl_of(own, turned).columns["kl"].values, [0, 0])


def test_kto_for_a_good_and_a_bad_row() -> None:
    # Row 0, good: r = -1 - -3 = 2, beta (r - z) = 0.5 (2 - 1) = 0.5.    L = 1 - s(0.5)
    # Row 1, bad:  r = -2 - -1 = -1, beta (z - r) = 0.5 (1 + 1) = 1.     L = 2 (1 - s(1))
    rows = micro_batch({"ref_log_probs": [-1.0, -2.0, -1.0], "desirable": [1.0, 0.0], "kl": [1.0, 1.0]}, [2, 1])
    said = ModelOutput(log_probs=torch.tensor([-0.25, -0.75, -2.0]))
    value, _ = kto_loss(0.5, desirable=1.0, undesirable=2.0)(said, rows)
    sigmoid = lambda x: 1 / (1 + exp(-x))  # noqa: E731
    np.testing.assert_allclose(value, [1 - sigmoid(0.5), 2 * (1 - sigmoid(1.0))], rtol=1e-6)


def test_hypos_kl_has_the_gradient_of_the_score_function() -> None:
    log_probs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    value, metrics = kl_of_samples()(
        ModelOutput(log_probs=log_probs), micro_batch({"ref_log_probs": [-2.0, -2.0, -2.5]}, [2, 1])
    )
    value.sum().backward()
    # log-ratios of the rows: (-3 - -4) = 1 and (-3 - -2.5) = -0.5; each token of a row has its row's.
    assert log_probs.grad is not None and log_probs.grad.tolist() == [1.0, 1.0, -0.5]
    assert metrics["kl"].tolist() == [1.0, -0.5]


def test_chords_schedule_and_its_weight_of_an_experts_token() -> None:
    # Two steps of warm-up to 0.8; then four of a cosine from 0.8 at step 2 to 0.2 at step 6: cos(pi / 4) at step 3.
    by_hand = [0.0, 0.4, 0.8, 0.5 + 0.3 * sqrt(0.5), 0.5, 0.2, 0.2]
    assert [mu_at(step, 0.8, 0.2, 2, 4) for step in (0, 1, 2, 3, 4, 6, 9)] == pytest.approx(by_hand)
    assert [mu_at(step, 0.1, 0.1, 0, 0) for step in (0, 1, 50)] == [0.1, 0.1, 0.1]  # CHORD-phi
    assert mu_at(0, 0.9, 0.05, 0, 200) == 0.9 and mu_at(100, 0.9, 0.05, 0, 200) == pytest.approx(0.475)  # CHORD-mu
    value, _ = expert_nll()(ModelOutput(log_probs=torch.tensor([log(0.5), log(0.1)])), micro_batch({}, [2]))
    np.testing.assert_allclose(value, [-0.25 * log(0.5), -0.09 * log(0.1)], rtol=1e-6)
    # The weight is a number, not a function of the policy: d/dx of -w x is -w.
    assert gradient(expert_nll(), [log(0.5), log(0.1)], {}, [2]) == pytest.approx([-0.25, -0.09])
    plain, _ = expert_nll(weighted=False)(ModelOutput(log_probs=torch.tensor([-2.0])), micro_batch({}, [1]))
    assert plain.tolist() == [2.0]


def test_gresos_streaks_grow_end_and_decide() -> None:
    history, settings = History(), {"solved": 1.0, "step": 0.1, "easy": 0.5, "hard": 0.0}
    values = history.initial(GRESO(explore=0.5))
    batch = Batch(
        {
            "prompt": Column.strings(["a", "a", "b", "b", "c", "c"]),
            "group_id": Column(np.array([0, 0, 1, 1, 2, 2])),
            "rewards": Column(np.array([1, 1, 0, 0, 0, 1], np.float32)),
        }
    )
    values, _ = history.report(values, batch, **settings)
    assert values["streaks"] == {"a": [1, "easy"], "b": [1, "hard"]}
    # One group of three is easy, and half may be: p rises. One is hard, and none may be: p falls.
    assert (values["easy"], values["hard"]) == pytest.approx((0.6, 0.4))
    values, _ = history.report(values, batch.slice(0, 2), **settings)
    assert values["streaks"]["a"] == [2, "easy"]
    prompts = Batch({"prompt": Column.strings(["a", "b", "c"] * 400)})
    _, kept = history.promising({**values, "easy": 0.5, "hard": 0.5}, prompts, rng=np.random.default_rng(0))
    assert kept.keep is not None
    share = np.bincount(kept.keep % 3, minlength=3) / 400
    np.testing.assert_allclose(share, [0.25, 0.5, 1.0], atol=0.06)  # p^2, p, and no streak


def test_pf_ppo_keeps_the_best_the_worst_or_one_at_random() -> None:
    batch = Batch(
        {
            "rewards": Column(np.array([1, 3, 2, 3, 0, 5], np.float32)),
            "group_id": Column(np.array([0, 0, 0, 0, 0, 1])),
        }
    )
    rng = np.random.default_rng(0)
    assert filtered(batch, keep="best", rng=rng).keep.tolist() == [1, 5]  # the first of a tie
    assert filtered(batch, keep="best_worst", rng=rng).keep.tolist() == [1, 4, 5]
    drawn = {tuple(filtered(batch, keep="best_random", rng=rng).keep) for _ in range(50)}
    assert {row for rows in drawn for row in rows} == {0, 1, 2, 3, 4, 5} and all(
        1 in rows and 5 in rows for rows in drawn
    )


def test_macro_actions_of_one_token_are_ppo_and_of_two_share_their_advantage() -> None:
    columns = {
        "rewards": Column(np.array([1.0, -1.0], np.float32)),
        "values": ragged([0.5, 0.1, 0.3], [0.2]),
        "response_mask": ragged([1, 1, 1], [1], dtype="uint8"),
        "old_log_probs": ragged([-1, -2, -1], [-1]),
        "ref_log_probs": ragged([-1.5, -2, -1], [-1]),
    }
    batch, settings = Batch(columns), {"gamma": 1.0, "lam": 0.9, "kl_coef": 0.2}
    one, plain = segment_gae(batch, segment=1, **settings), gae(batch, **settings).columns
    for name in ("advantages", "returns"):
        np.testing.assert_allclose(one[name].values, plain[name].values, rtol=1e-6)
    # Segments {0, 1} and {2}: values 0.3 and 0.3, rewards -0.2 * 0.5 + 0 = -0.1 and 1.
    # delta_1 = 1 - 0.3 = 0.7; delta_0 = -0.1 + 0.3 - 0.3 = -0.1, A_0 = -0.1 + 0.9 * 0.7 = 0.53. Row 1: -1 - 0.2.
    two = segment_gae(batch, segment=2, **settings)
    np.testing.assert_allclose(two["advantages"].values, [0.53, 0.53, 0.7, -1.2], rtol=1e-5)
    np.testing.assert_allclose(two["returns"].values, [0.83, 0.83, 1.0, -1.0], rtol=1e-5)


def test_each_model_scores_the_ends_of_its_own_segments() -> None:
    batch = Batch(
        {
            "relevance": ragged([1, 2, 3, 4, 5], [6]),
            "facts": ragged([10, 20, 30, 40, 50], [60]),
            "response_mask": ragged([1] * 5, [1], dtype="uint8"),
        }
    )
    result = rewards_of_segments(batch, relevance_every=2, relevance_weight=1.0, facts_every=3, facts_weight=0.1)
    # Relevance after tokens 2, 4 and 5 (the last): 2, 4, 5; facts after 3 and 5: 3, 5. Row 1 has one token.
    np.testing.assert_allclose(result.columns["token_rewards"].values, [0, 2, 3, 4, 10, 12])
    assert result.columns["rewards"].values.tolist() == [0, 0]
    assert result.metrics["facts"].value == pytest.approx((30 + 50 + 60) / 3)


def test_oreal_copies_what_is_right_and_avoids_what_is_wrong_where_the_token_reward_is_sure() -> None:
    # Right, w = ln 3: sigma = 3/4, w+ = 1/2; w = -1: w+ = 0.    Wrong, w = -ln 3: w- = 1/2, A = -1/2; w = 1: w- = 0.
    columns = {
        "label": [1.0, -1.0],
        "values": [log(3), -1.0, -log(3), 1.0],
        "advantages": [0.5, 0.5, -0.5, -0.5],
        "ref_log_probs": [-1.0, -1.0, -1.0, -2.0],
    }
    rows = micro_batch(columns, [2, 2])
    said = ModelOutput(log_probs=torch.tensor([-2.0, -1.0, -1.0, -1.0]))
    value, metrics = copy_and_avoid(0.5, 0.1)(said, rows)
    kl = [exp(1) - 2, 0, 0, exp(-1)]  # exp(d) - 1 - d with d = 1, 0, 0, -1
    np.testing.assert_allclose(metrics["ref_kl_k3"], kl, rtol=1e-6)
    # -1/2 * -2 = 1; 0; -eta A w- log pi = -0.5 * -0.5 * 0.5 * -1 = -0.125: a lower log pi makes it lower; 0
    np.testing.assert_allclose(value, np.array([1, 0, -0.125, 0]) + 0.1 * np.array(kl), rtol=1e-5, atol=1e-7)


def test_oreals_token_reward_is_right_about_the_mean_of_its_tokens() -> None:
    rows = micro_batch({"label": [1.0, -1.0]}, [2, 1])
    value, metrics = outcome_cross_entropy()(ModelOutput(values=torch.tensor([1.0, 3.0, 0.5])), rows)
    np.testing.assert_allclose(value, [log(1 + exp(-2)), log(1 + exp(0.5))], rtol=1e-6)
    assert metrics["accuracy"].tolist() == [1, 0]


def test_oreal_keeps_one_right_and_one_wrong_row_of_mixed_groups() -> None:
    rewards = np.array([1, 0, 1, 0, 0, 1], np.float32)
    batch = Batch({"rewards": Column(rewards), "group_id": Column(np.array([7, 7, 7, 8, 8, 9]))})
    made = right_and_wrong(batch, solved=1.0, rng=np.random.default_rng(0))
    assert made.keep is not None and made.keep[0] in (0, 1, 2) and sorted(rewards[made.keep]) == [0, 1]
    assert made.columns["label"].values.tolist() == [1 if rewards[row] else -1 for row in made.keep]
    assert made.metrics["mixed_groups"].value == pytest.approx(1 / 3)


def test_the_kl_coefficient_follows_the_kl_of_a_response() -> None:
    # KL of the rows: 2 + 4 nats and 0, the masked token not counted: 3 a row; e = 3 / 2.5 - 1 = 0.2, then 2.
    batch = Batch(
        {
            "old_log_probs": ragged([-1, -1, 5], [-1]),
            "ref_log_probs": ragged([-3, -5, 0], [-1]),
            "response_mask": ragged([1, 1, 0], [1], dtype="uint8"),
        }
    )
    state = KlCoefficient()
    for target, coef in ((2.5, 0.2 * 1.02), (1.0, 0.2 * 1.02), (6.0, 0.2 * 0.98)):
        numbers, metrics = state.follow(state.initial(AdaptiveKL()), batch, target=target, gain=0.1)
        assert numbers["coef"] == pytest.approx(coef) and metrics["kl"].value == pytest.approx(3)


def test_nash_mds_advantage_is_the_win_less_a_half_and_the_price_of_the_log_ratio() -> None:
    # Rewards 1 and 0: P = s(1); sum of log ratios 1 + 2.
    batch = Batch(
        {
            "rewards": Column(np.float32([1])),
            "their_rewards": Column(np.float32([0])),
            "old_log_probs": ragged([-1, -1]),
            "ref_log_probs": ragged([-2, -3]),
            "response_mask": ragged([1, 1], dtype="uint8"),
        }
    )
    result = win_advantage(batch, kl_coef=0.1, scale=1.0)
    np.testing.assert_allclose(result.columns["advantages"].values, [1 / (1 + exp(-1)) - 0.5 - 0.3] * 2, rtol=1e-6)


def test_the_additive_prompt_asks_for_what_its_parser_reads() -> None:
    assert Template(ADDITIVE).columns == ("prompt", "response")
    settings = SelfRewarding()
    assert Number(settings.marker, low=0, high=5)("It is relevant and clear.\nScore: 4") == {"score": 4.0}
