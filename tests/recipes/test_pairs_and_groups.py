"""What examples of ones hide, of recipes that compare: several tokens a row, several rows a group, scales, a sum of 0.

Each number was worked by hand from the recipe's formula, and tells a factor from a divisor and plus from minus.
"""

from __future__ import annotations

import json
from math import exp, log, sqrt

import numpy as np
import pytest
import torch

from recipes.agents.ask_for_help import interventions
from recipes.agents.gameable import gamed
from recipes.constrained.safe_rlhf import Lagrange
from recipes.online_preference._sample_pairs import sample_pair_loss, win_regression
from recipes.online_preference.active import furthest_apart, most_unsure
from recipes.online_preference.cream import consistent_dpo, self_rewards
from recipes.online_preference.cyclealign import agreed
from recipes.online_preference.dueling import bounds
from recipes.online_preference.egpo import duels, online_ipo
from recipes.online_preference.eva import informative
from recipes.online_preference.likelihood_reward import likelihoods
from recipes.online_preference.nash_md import win_advantage
from recipes.online_preference.pmpo import good_and_bad, weighted_likelihood
from recipes.online_preference.popri import best_and_ranked, directions, private_scores
from recipes.reasoning._rewards import bleu, format_and_answer, reaches, tool_calls
from recipes.reasoning.spark import verdict_is_right
from recipes.reward_models.armorm import OBJECTIVES, VERBOSITY, gated_preference
from rlhf_dist.algorithms.contract import ModelOutput
from rlhf_dist.batch import Batch, Column
from rlhf_dist.missing import MISSING
from tests.recipes.rows import gradient, masked, micro_batch, numbers, of_rows, ragged, values


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def log_sigmoid(x: float) -> float:
    return -log(1 + exp(-x))


def groups(*ids: int) -> Column:
    return numbers(*ids, dtype="int64")


# --- games ------------------------------------------------------------------------------------------------------
def test_egpos_target_is_a_difference_of_chances_over_beta() -> None:
    # Scale 2: sigma(2 log 3 / 2) = 3/4 and sigma(0) = 1/2; then 1/2 and 1/4. Over beta 0.2: 1.25 of both prompts.
    batch = Batch(
        {
            "rewards": numbers(2 * log(3) + 1, 1, 5, 5 - 2 * log(3)),
            "their_rewards": numbers(1, 1, 5, 5),
            "group_id": groups(3, 3, 4, 4),
        }
    )
    made = duels(batch, beta=0.2, scale=2.0)
    assert values(made, "sign") == [1, -1, 1, -1]
    assert values(made, "target") == pytest.approx([1.25] * 4)
    # h = (-1 + 2) + (-2 + 2) = 1 and -3 + 1 = -2: gap 3. (3 - 1.25)^2, and its slopes 2 (3 - 1.25) and the negative.
    columns = {"sign": [1.0, -1.0], "target": [1.25, 1.25], "ref_log_probs": [-2.0, -2.0, -1.0]}
    assert of_rows(online_ipo(), [-1.0, -2.0, -3.0], columns, [2, 1], [0, 0]) == pytest.approx([1.75**2])
    assert gradient(online_ipo(), [-1.0, -2.0, -3.0], columns, [2, 1], [0, 0]) == pytest.approx([3.5, 3.5, -3.5])


def test_nash_mds_advantage_divides_rewards_by_their_scale_and_counts_tokens_that_count() -> None:
    batch = Batch(
        {
            "rewards": numbers(2 * log(3)),
            "their_rewards": numbers(0),
            "old_log_probs": ragged([-1, -9]),
            "ref_log_probs": ragged([-3, -1]),
            "response_mask": ragged([1, 0], dtype="uint8"),
        }
    )
    # 3/4 - 1/2 - 0.25 * 2.
    assert values(win_advantage(batch, kl_coef=0.25, scale=2.0).columns, "advantages") == pytest.approx([-0.25] * 2)


def test_losses_on_samples_with_gaps_that_are_not_one() -> None:
    # Rows of two tokens: D_t = 0.1 and 0; rewards 3 and 0: p3o's half gap 1.5, the ratio e^0.1 uncut.
    said, lengths, same = [-1.0, -0.9, -1.0, -1.0], [2, 2], [0, 0]
    drawn = {"label": [1, -1], "old_log_probs": [-1.0] * 4, "ref_log_probs": [-1.0] * 4, "rewards": [3.0, 0.0]}
    assert of_rows(sample_pair_loss("p3o", beta=0.0), said, drawn, lengths, same) == pytest.approx([-exp(0.1) * 1.5])
    won = {**drawn, "win": [0.25, -0.25]}
    chance = sigmoid(0.5)
    by_hand = -chance * log_sigmoid(0.2) - (1 - chance) * log_sigmoid(-0.2)
    assert of_rows(sample_pair_loss("dno", eta=2.0), said, won, lengths, same) == pytest.approx([by_hand])
    found = of_rows(win_regression(2.0), said, won, lengths)
    assert found == pytest.approx([(0.1 - 0.5) ** 2, (0.0 + 0.5) ** 2])


# --- what is learned, and from whom -----------------------------------------------------------------------------
def test_pmpo_raises_what_is_good() -> None:
    batch = Batch({"rewards": numbers(2, 2, -1, 1), "group_id": groups(0, 0, 0, 0)})  # the mean is 1
    assert values(good_and_bad(batch, alpha=0.75), "weight") == [0.375, 0.375, -0.25, 0]
    weights = {"weight": [0.375, -0.25]}
    # -(0.375 * (-1 - 2) - 0.25 * -4), a response of two tokens and one of one.
    assert of_rows(weighted_likelihood(), [-1.0, -2.0, -4.0], weights, [2, 1], [0, 0]) == pytest.approx([0.125])
    found = gradient(weighted_likelihood(), [-1.0, -2.0, -4.0], weights, [2, 1], [0, 0])
    assert found == pytest.approx([-0.375, -0.375, 0.25])


def test_labels_are_asked_for_by_entropy_of_a_token_and_distance_of_responses() -> None:
    batch = Batch(
        {
            "entropy": ragged([1, 9], [1, 1, 1], [2, 2], [0, 1]),
            "old_log_probs": ragged([-1, 9], [-1, -1, -1], [-5, -1], [-1, -1]),
            "ref_log_probs": ragged([-1, -9], [-2, -2, -2], [-1, -1], [-9, -1]),
            "response_mask": ragged([1, 0], [1, 1, 1], [1, 1], [1, 1], dtype="uint8"),
            "group_id": groups(0, 0, 1, 1),
        }
    )
    # Group 0: 4 over 4 tokens; group 1: 5 over 4 tokens. Of rows the means are 1, 1, 2, 1/2.
    assert most_unsure(batch, share=0.5).keep.tolist() == [2, 3]  # type: ignore[union-attr]
    # log pi/pi_ref: 0, 3 | -4, 8.
    assert furthest_apart(batch, share=0.5).keep.tolist() == [2, 3]  # type: ignore[union-attr]
    turned = Batch(
        {name: batch[name] for name in ("entropy", "response_mask", "group_id")}
        | {"entropy": ragged([3, 9], [1, 1, 1], [1, 1], [1, 1])}
    )
    assert most_unsure(turned, share=0.5).keep.tolist() == [0, 1]  # type: ignore[union-attr]  # 6/4 against 4/4


def test_cream_counts_tokens_that_count_and_sums_over_a_response() -> None:
    batch = Batch(
        {
            "old_log_probs": ragged([-1, 9], [-2, -2]),
            "previous_log_probs": ragged([-2, 9], [-1, -1]),
            "ref_log_probs": ragged([-4, -9], [-3, -3]),
            "response_mask": ragged([1, 0], [1, 1], dtype="uint8"),
            "group_id": groups(0, 0),
        }
    )
    made = self_rewards(batch).columns  # own 3, 2; before 2, 4: they disagree
    assert values(made, "rewards") == [3, 2] and values(made, "consistency") == [0, 0]
    alone = self_rewards(batch.take(np.array([0]))).columns
    assert values(alone, "consistency") == [1]
    # h = 2 and 0, beta 0.25: the margin 0.5.
    rows = {"label": [1, -1], "previous_log_probs": [-2.0, -2.0, -3.0], "consistency": [0.75, 0.75]}
    found = of_rows(consistent_dpo(0.25), [-1.0, -1.0, -3.0], rows, [2, 1], [0, 0])
    assert found == pytest.approx([-0.75 * log_sigmoid(0.5) - 0.25 * log_sigmoid(-0.5)])


def test_what_judge_and_policy_agree_on_is_by_the_mean_of_tokens_that_count() -> None:
    # Means -1, -2, -1.5 (the last token does not count): the judge's 3, 1, 2 order them alike.
    batch = Batch(
        {
            "old_log_probs": ragged([-1, -1, -1], [-2], [-1, -2, -90]),
            "response_mask": ragged([1, 1, 1], [1], [1, 1, 0], dtype="uint8"),
            "rewards": numbers(3, 1, 2),
            "group_id": groups(0, 0, 0),
        }
    )
    result = agreed(batch)
    assert result.keep is not None and result.keep.tolist() == [0, 1, 2]
    assert result.metrics["ranking_agreement"].value == 1


def test_prompts_evolve_in_proportion_to_their_informativeness() -> None:
    # Ranges 3, 0, 1: the first is drawn in 3 of 4.
    batch = Batch({"rewards": numbers(3, 0, 1, 1, 0, 1), "group_id": groups(0, 0, 1, 1, 2, 2)})
    drawn = [informative(batch, count=1, rng=np.random.default_rng(seed)).parent.tolist() for seed in range(400)]  # type: ignore[union-attr]
    assert {tuple(one) for one in drawn} == {(0,), (4,)}
    assert sum(one == [0] for one in drawn) / 400 == pytest.approx(0.75, abs=0.06)


def test_follow_ups_are_summed_over_tokens_that_count_with_their_signs() -> None:
    batch = Batch({"row_id": groups(7, 8), "group_id": groups(0, 0)})
    said = Batch(
        {
            "parent_id": groups(7, 7, 8, 8),
            "sign": numbers(1, -0.5, 1, -0.5),
            "log_probs": ragged([-1, -9], [-2, -2], [-3, 0], [-4, 0]),
            "response_mask": ragged([1, 0], [1, 1], [1, 1], [1, 1], dtype="uint8"),
            "group_id": groups(0, 0, 0, 0),
        }
    )
    assert values(likelihoods(batch, said), "rewards") == [1, -1]  # -1 + 2 and -3 + 2


def test_clients_similarities_are_cut_to_their_length() -> None:
    # Two clients along x and y; three samples at (1, 0), (0.6, 0.8), and nothing that counts.
    states = Column(np.array([[2, 0], [3, 4], [5, 5]], np.float32), np.arange(4))
    samples = Batch({"hidden": states, "response_mask": ragged([1], [1], [0], dtype="uint8")})
    np.testing.assert_allclose(directions(samples), [[1, 0], [0.6, 0.8], [0, 0]])
    clients = Batch(
        {"hidden": Column(np.array([[1, 0], [0, 3]], np.float32), np.arange(3)), "response_mask": masked(1, 1)}
    )
    # Similarities (1, 0.6, 0) of length sqrt(1.36), cut to 1, and (0, 0.8, 0), which is shorter.
    made = private_scores(samples, clients, noise=0.0, longest=1.0, rng=np.random.default_rng(0))
    cut = 1 / sqrt(1.36)
    assert values(made.columns, "rewards") == pytest.approx([cut / 2, (0.6 * cut + 0.8) / 2, 0])
    assert made.metrics["cut_clients"].value == 0.5
    ranked = best_and_ranked(Batch({"rewards": numbers(1, 3, 2), "group_id": groups(0, 0, 0)}), rank=2)
    assert ranked.keep is not None and ranked.keep.tolist() == [1, 2] and values(ranked.columns, "label") == [1, -1]


def test_a_gated_reward_pays_for_verbosity() -> None:
    # A gate that is all on objective 0: r = r_0 - price * verbosity: 1 - 0.5 * 0.4 and 0.5 - 0.5 * 2.
    gate = torch.full((2, OBJECTIVES), -40.0, dtype=torch.float64)
    gate[:, 0] = 0.0
    objectives = torch.zeros(2, OBJECTIVES, dtype=torch.float64)
    objectives[:, 0], objectives[:, VERBOSITY] = torch.tensor([1.0, 0.5]), torch.tensor([0.4, 2.0])
    assert VERBOSITY in (-1, OBJECTIVES - 1)
    model = ModelOutput(heads={"objectives": objectives, "gate": gate})
    value, metrics = gated_preference(0.5)(model, micro_batch({"label": [1, -1]}, [1, 1], [0, 0]))
    assert metrics["margin"].tolist() == pytest.approx([0.8 + 0.5])
    assert value.tolist() == pytest.approx([-log_sigmoid(1.3)])


# --- verdicts that could not be read ----------------------------------------------------------------------------
def test_verdicts_that_could_not_be_read_are_given_to_the_ops_that_know_what_they_are() -> None:
    said = Batch({"choice": numbers(1, 0, MISSING), "parsed": numbers(1, 1, 0), "wanted": numbers(1, 1, 0)})
    assert verdict_is_right.missing and values(verdict_is_right(said).columns, "rewards") == [1, 0, 0]
    rows = Batch({"row_id": groups(7, 8), "rewards": numbers(2, 5), "group_id": groups(0, 0)})
    verdicts = Batch(
        {
            "parent_id": groups(7, 7, 7, 8),
            "score": numbers(1, 3, MISSING, 5),
            "parsed": numbers(1, 1, 0, 1),
            "group_id": groups(0, 0, 0, 0),
        }
    )
    # Scores 1 and 3: deviation 1, standard error 1 / sqrt(2), twice that on each side of the mean. One score has none.
    made = bounds(rows, verdicts, width=2.0)
    assert bounds.missing and values(made, "upper") == pytest.approx([2 + sqrt(2), 5])
    assert values(made, "lower") == pytest.approx([2 - sqrt(2), 5])


# --- budgets ----------------------------------------------------------------------------------------------------
def test_help_is_kept_for_where_it_gains_most() -> None:
    # Gains 0.8, 0.5, 0.9 and one help: asked for at once it leaves 1 + 0.5 + 0.1, kept to the end 0.2 + 0.5 + 1.
    assert interventions(np.array([0.2, 0.5, 0.1]), 1.0, 1) == [False, False, True]
    assert interventions(np.array([0.2, 0.5, 0.1]), 1.0, 2) == [True, False, True]


def test_a_pessimistic_cost_is_two_standard_errors_above_the_mean() -> None:
    # Costs 1 and 3: mean 2, deviation sqrt(2), standard error 1. log multiplier: 0 + 0.5 * 1 * (2 + 2 * 1 - 1).
    found, metrics = Lagrange().update(
        {"multiplier": 1.0}, Batch({"costs": numbers(1, 3)}), limit=1.0, lr=0.5, pessimism=2.0
    )
    assert metrics["cost"].value == pytest.approx(4)
    assert found["multiplier"] == pytest.approx(exp(1.5))


def test_a_gamed_reward_is_one_above_a_half_for_a_wrong_answer() -> None:
    said = [json.dumps([{"who": "model", "text": text}]) for text in (" 5 ", "4", "4", "4")]
    batch = Batch(
        {
            "rewards": numbers(1, 1, 0.5, 0.6),
            "answer": Column.strings(["5"] * 4),
            "transcript": Column.strings(said),
        }
    )
    assert gamed(batch, game="flattery").metrics["gamed_flattery"].value == 2 / 4


# --- rules ------------------------------------------------------------------------------------------------------
def test_rules_of_answers_at_their_edges() -> None:
    right, wrong = "<think>x</think><answer>7</answer>", "<think>x</think><answer>8</answer>"
    assert (format_and_answer(right, " 7 "), format_and_answer(wrong, "7"), format_and_answer("7", "7")) == (1, 0.1, 0)
    assert reaches("6 / 3 + 1", [1, 3, 6], 3) and not reaches("6 / 3 + 1", [1, 3, 6], 3.001)
    assert not reaches("-6 + 9", [6, 9], 3) and not reaches("abs(3)", [3], 3)  # of a sign and a name nothing is known


def test_bleu_counts_one_to_four_words_and_shortness() -> None:
    # Of a b c d against a b c d e: all n-grams found, with one more for n > 1; brevity e^(1 - 5/4).
    assert bleu("a b c d", "a b c d e") == pytest.approx(exp(-0.25))
    # a b x d against a b c d: 3/4, (1 + 1)/(3 + 1), (0 + 1)/(2 + 1), (0 + 1)/(1 + 1).
    assert bleu("a b x d", "a b c d") == pytest.approx((3 / 4 * 1 / 2 * 1 / 3 * 1 / 2) ** 0.25)


def test_a_tool_call_with_one_of_two_parameters() -> None:
    wanted = '[{"name": "add", "parameters": {"a": 1, "b": 2}}]'
    said = '<think>x</think>\n<tool_call>\n{"name": "add", "parameters": {"a": 1, "c": 2}}\n</tool_call>'
    # Names 1; parameter names 1 of 3; values 1. R = 1 + 1/3 + 1, S = 1 + 1 + 2.
    assert tool_calls(said, wanted) == pytest.approx(1 + 6 * (7 / 3) / 4 - 3)
    none = '<think>x</think>\n<tool_call>\n{"name": "add"}\n</tool_call>'
    assert tool_calls(none, '[{"name": "add"}]') == pytest.approx(1 + 3)  # nothing is asked for, and nothing given
