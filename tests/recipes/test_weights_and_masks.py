"""What examples of ones hide: advantages that are not 1 or -1, weights, ties, a second row, tokens that do not count.

Each number was worked by hand from the recipe's formula, and tells a factor from a divisor.
"""

from __future__ import annotations

from math import exp, log
from typing import Any

import numpy as np
import pytest
import torch

from recipes.policy_gradient._surrogates import covariance_of, covariance_surrogate, row_surrogate, token_surrogate
from recipes.policy_gradient.dense_rewards import confident_penalty, implicit_rewards, kept_as_it_is, step_rewards
from recipes.policy_gradient.improvement import gap_loss
from recipes.policy_gradient.ma_rlhf import segment_gae
from recipes.policy_gradient.oreal import copy_and_avoid
from recipes.policy_gradient.rejection import own_likelihood, penalised
from recipes.policy_gradient.relevance import words_in_common
from recipes.policy_gradient.shaped_rewards import Shaped, Spread, against_references, by_length
from recipes.policy_gradient.teacher_forced import recovered_rewards
from recipes.policy_gradient.thinking import answers_alone
from recipes.preference._lists import list_loss
from recipes.preference._pairs import with_reference
from recipes.preference.active_pairs import most_informative
from recipes.preference.dppo import predicted_wins
from recipes.preference.dro import bracket
from recipes.preference.kto import reward_shift
from recipes.preference.mapl import further_apart
from recipes.preference.srpo import generator_loss, reviser_loss
from recipes.reasoning.refcritic import verdict_and_use
from rlhf_dist.algorithms.contract import ModelOutput
from rlhf_dist.batch import Batch, Column
from rlhf_dist.missing import MISSING, is_missing
from tests.recipes.rows import gradient, masked, micro_batch, numbers, of_rows, ragged, values


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def log_sigmoid(x: float) -> float:
    return -log(1 + exp(-x))


# --- surrogates: two tokens of two rows, rho = 2 and 1/2, A = 2 and -3 -----------------------------------------
LOG_PROBS = [log(0.4), log(0.2)]
OLD = {"old_log_probs": [log(0.2), log(0.4)], "advantages": [2.0, -3.0]}
WIDE = {"low": 0.6, "high": 1.5}


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("cispo", {"low": 0.2, "high": 0.5}, [-1.5 * 2 * log(0.4), 0.8 * 3 * log(0.2)]),
        ("sapo", {"temperature": 1.0, "negative_temperature": 2.0}, [-4 * sigmoid(1) * 2, 2 * sigmoid(-1) * 3]),
        ("mdpo", {"coef": 0.5}, [-4 + 0.5 * (2 * log(2) - 1), 1.5 + 0.5 * (0.5 * log(0.5) + 0.5)]),
        ("one_side", WIDE, [-4, 1.5]),
        ("two_side", {**WIDE, "importance": False}, [-2 * log(0.4), 3 * log(0.2)]),
    ],
)
def test_a_surrogate_is_linear_in_the_advantage(kind: Any, settings: dict[str, Any], expected: list[float]) -> None:
    assert of_rows(token_surrogate(kind, **settings), LOG_PROBS, OLD, [1, 1]) == pytest.approx(expected)


def test_surrogates_of_responses_take_their_advantage_as_a_factor() -> None:
    # Of one token rho is that token's: cut at e^0.4 where A > 0, at e^-0.4 where A < 0.
    found = of_rows(row_surrogate("gmpo", low=0.4, high=0.4), LOG_PROBS, OLD, [1, 1])
    assert found == pytest.approx([-2 * exp(0.4), 3 * exp(-0.4)])
    found = of_rows(row_surrogate("opmd", tau=0.5), LOG_PROBS, OLD, [1, 1])
    assert found == pytest.approx([-2 * log(0.4) + log(2) ** 2 / 4, 3 * log(0.2) + log(2) ** 2 / 4])
    assert gradient(row_surrogate("topr"), LOG_PROBS, OLD, [1, 1]) == pytest.approx([-2, 3 / 2])


def test_covariances_cut_or_charge_the_tokens_that_are_picked() -> None:
    none = {**OLD, "picked": [0.0, 0.0]}
    assert of_rows(covariance_surrogate("clip_cov"), LOG_PROBS, none, [1, 1]) == pytest.approx([-2.4, 2.4])
    both = {**OLD, "picked": [1.0, 1.0]}
    found = of_rows(covariance_surrogate("kl_cov", kl_coef=0.5), LOG_PROBS, both, [1, 1])
    assert found == pytest.approx([-4 + 0.5 * log(2), 1.5 + 0.5 * log(2)])  # |log rho|, of either sign
    # log pi -1, -3, -2, -2 (mean -2), A 3, -1, 0, 2 (mean 1): cov 2, 2, 0, 0. Of five tokens one does not count.
    batch = Batch(
        {
            "old_log_probs": ragged([-1, -3, -9], [-2, -2]),
            "advantages": ragged([3, -1, 50], [0, 2]),
            "response_mask": ragged([1, 1, 0], [1, 1], dtype="uint8"),
        }
    )
    picked = covariance_of(batch, kind="kl_cov", share=0.5, low=0, high=0, rng=np.random.default_rng(0))
    assert values(picked.columns, "picked") == [1, 1, 0, 0, 0] and picked.metrics["picked"].value == 0.5


def test_oreal_avoids_in_proportion_to_the_advantage_and_to_how_sure_the_token_model_is() -> None:
    # sigma(log 3) = 3/4: w+ = w- = 1/2. -1/2 log p of a right one, 0.4 * 2 * 1/2 log p of a wrong one with A = -2.
    columns = {"label": [1, -1], "values": [log(3), -log(3)], "advantages": [0.5, -2.0], "ref_log_probs": [-1.0, -3.0]}
    assert of_rows(copy_and_avoid(0.4, 0.0), [-1.0, -3.0], columns, [1, 1]) == pytest.approx([0.5, -1.2])


# --- tokens that do not count ----------------------------------------------------------------------------------
ENDS = {"response_mask": ragged([1, 0], [1, 1], dtype="uint8"), "rewards": numbers(2, 3)}


def test_dense_rewards_leave_out_tokens_that_do_not_count() -> None:
    batch = Batch({**ENDS, "dpo_log_probs": ragged([-1, -9], [-2, -3]), "ref_log_probs": ragged([-3, -1], [-1, -3])})
    made = implicit_rewards(batch, coef=0.5, reward_coef=2.0)
    assert values(made, "token_rewards") == [1, 0, -0.5, 0] and values(made, "rewards") == [4, 6]
    batch = Batch({**ENDS, "rewritten_log_probs": ragged([-1, -9], [-2, -3])})
    made = kept_as_it_is(batch, coef=0.5, reward_coef=2.0)
    assert values(made, "token_rewards") == [-0.5, 0, -1, -1.5] and values(made, "rewards") == [4, 6]
    # -0.5 pi_ref log pi/pi_ref: pi_ref 1/2, 1/4 and 1/4, log-ratios -1, 2 and 4.
    ref = ragged([log(0.5), 0], [log(0.25), log(0.25)])
    old = ragged([log(0.5) - 1, -5], [log(0.25) + 2, log(0.25) + 4])
    made = confident_penalty(Batch({**ENDS, "old_log_probs": old, "ref_log_probs": ref}), coef=0.5)
    assert values(made, "token_rewards") == pytest.approx([0.25, 0, -0.25, -0.5])


def test_steps_begin_anew_in_every_row() -> None:
    # Steps of two tokens: p is 3, 1 in row 0, and 5, 2, 6 in row 1, the last of each taken as 0 by delta.
    batch = Batch(
        {
            "step_values": ragged([9, 3, 1], [9, 5, 9, 2, 6]),
            "response_mask": masked(3, 5),
            "rewards": numbers(1, 2),
        }
    )
    made = step_rewards(batch, kind="delta", step_tokens=2, eta=0.0, coef=0.5, reward_coef=3.0)
    assert values(made, "token_rewards") == [0, 1.5, 0, 0, 1.5, 0, 1, 0] and values(made, "rewards") == [3, 6]
    made = step_rewards(batch, kind="clip", step_tokens=2, eta=3.5, coef=2.0, reward_coef=1.0)
    assert values(made, "token_rewards") == [0, -1, -5, 0, 0, 0, -3, 0]


def test_log_probs_of_responses_are_those_of_tokens_that_count() -> None:
    said = {"old_log_probs": ragged([-1, -9], [-2, -3]), "ref_log_probs": ragged([-3, -1], [-1, -3])}
    mask = {"response_mask": ENDS["response_mask"]}
    assert values(own_likelihood(Batch({**ENDS, **said})), "rewards") == [-1, -5]
    assert values(penalised(Batch({**ENDS, **said}), price=0.5), "rewards") == [1, 3.5]  # log-ratios 2 and -1
    rated = {"reward": numbers(2, 3), "values": ragged([1, 7], [5, 7])}
    made = bracket(Batch({**rated, **said, **mask}), tau=2.0)
    assert values(made, "surplus") == [1, -2] and values(made, "value_target") == [-2, 5]
    shifted = reward_shift(Batch({**said, **mask, "desirable": numbers(1, 0)}))
    assert values(shifted.columns, "kl") == [0.5, 0.5]  # half way between 2 and -1


def test_a_recovered_reward_ends_with_the_tokens_that_count() -> None:
    # 5 - 1, 2 - 4 | then one that does not count; discounted by a half: 4 - 1, -2.
    batch = Batch(
        {
            "logits": ragged([5, 2, 8]),
            "largest_logits": ragged([6, 1, 4]),
            "response_mask": ragged([1, 1, 0], dtype="uint8"),
        }
    )
    made = recovered_rewards(batch, gamma=0.5)
    assert values(made.columns, "token_rewards") == [4, -2, 0] and values(made.columns, "advantages") == [3, -2, 0]


# --- a second row, and its own ----------------------------------------------------------------------------------
def test_segments_begin_anew_in_every_row() -> None:
    # Segments of two: row 0 has tokens 0, 1 | 2, row 1 has 0, 1. lambda = gamma = 1: advantage = what comes - value.
    batch = Batch(
        {
            "rewards": numbers(4, 10),
            "values": ragged([1, 3, 5], [6, 8]),
            "response_mask": masked(3, 2),
            "old_log_probs": ragged([-1, -1, -1], [-1, -1]),
            "ref_log_probs": ragged([-2, -1, -1], [-1, -3]),
        }
    )
    # KL penalty 0.5 * (1, 0, 0 | 0, 2): segments' rewards -0.5, 4 | 9; values 2, 5 | 7.
    made = segment_gae(batch, segment=2, gamma=1.0, lam=1.0, kl_coef=0.5)
    assert values(made, "advantages") == [1.5, 1.5, -1, 2, 2] and values(made, "returns") == [3.5, 3.5, 4, 9, 9]


def test_a_thoughts_last_end_is_found_by_its_ids_wherever_it_stands() -> None:
    batch = Batch(
        {
            "response_ids": ragged([5, 8, 9, 6, 8, 9], [8, 9, 7], [5, 8], dtype="int32"),
            "response": Column.strings(["a</t>b</t>", "</t>c", "none"]),
        }
    )
    made = answers_alone(batch, end="</t>", end_ids=(8, 9))
    assert [row.tolist() for row in made.columns["response_ids"].rows()] == [[], [7], []]
    assert made.columns["response"].rows() == ["", "c", ""] and made.metrics["thoughts_ended"].value == 2 / 3


# --- pairs and lists --------------------------------------------------------------------------------------------
# h(w) = 2, h(l) = -3, beta 0.5.
PAIR = {"label": [1, -1], "ref_log_probs": [-3.0, -1.0]}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sppo", (2 - 1) ** 2 + (-3 + 1) ** 2),
        ("nca", -log_sigmoid(1) - (log_sigmoid(-1) + log_sigmoid(1.5)) / 2),
        ("apo_zero", 1 - sigmoid(1) + sigmoid(-1.5)),
        ("apo_down", sigmoid(1) + 1 - sigmoid(2.5)),
    ],
)
def test_beta_is_a_factor_of_both_sides(kind: Any, expected: float) -> None:
    assert of_rows(with_reference(kind, 0.5), [-1.0, -4.0], PAIR, [1, 1], [0, 0]) == pytest.approx([expected])


def test_the_first_of_equal_rewards_ranks_higher_in_pro() -> None:
    # Scores -1, -3, -2 and rewards 1, 1, 0: log-sums over all three, over the last two, over the last one.
    found = of_rows(list_loss("pro", nll_coef=0.5), [-1.0, -3.0, -2.0], {"rewards": [1.0, 1.0, 0.0]}, [1] * 3, [0] * 3)
    first, second = log(exp(-1) + exp(-3) + exp(-2)) + 1, log(exp(-3) + exp(-2)) + 3
    assert found == pytest.approx([first + second + 0.5 * 1])


def test_brain_weighs_log_probs_by_what_the_posterior_has_more() -> None:
    # log q = -1 of both, pi_ref = q, rewards log 3 and 0: a = 3/4, 1/4. pi: log-ratios log 1 and log 1: b = 1/2 each.
    columns = {"rewards": [log(3), 0.0], "ref_log_probs": [-2.0, -2.0], "old_log_probs": [-2.0, -2.0]}
    found = of_rows(list_loss("brain"), [-2.0, -2.0], columns, [1, 1], [0, 0])
    assert found == pytest.approx([-(1 / 4 * -2 - 1 / 4 * -2)])
    assert gradient(list_loss("brain"), [-2.0, -2.0], columns, [1, 1], [0, 0]) == pytest.approx([-1 / 4, 1 / 4])
    # pi three times as likely as q at the first: b = 3/4, 1/4, and with equal rewards a = 1/2 each.
    columns["rewards"] = [0.0, 0.0]
    said = [-2.0 + log(3), -2.0]
    found = of_rows(list_loss("brain"), said, columns, [1, 1], [0, 0])
    assert found == pytest.approx([-(-1 / 4 * said[0] + 1 / 4 * said[1])])


def test_srpos_two_squares_and_its_margin() -> None:
    # h(w | w) = 3, h(l | w) = 1, h(w | l) = 2, h(l | l) = -2, beta 0.25: (0.25 * 4 - 0.5)^2 + (0.25 * -2 + 0.5)^2 ...
    shown = {"label": [1, -1, 1, -1], "shown_label": [1, 1, -1, -1], "ref_log_probs": [-4.0, -3.0, -4.0, -1.0]}
    found = of_rows(reviser_loss(0.25), [-1.0, -2.0, -2.0, -3.0], shown, [1] * 4, [0] * 4)
    assert found == pytest.approx([0.5**2 + 0.0])
    # ... and with h(l | w) = -5: 0.25 * -8 + 0.5.
    shown["ref_log_probs"][1] = 3.0
    found = of_rows(reviser_loss(0.25), [-1.0, -2.0, -2.0, -3.0], shown, [1] * 4, [0] * 4)
    assert found == pytest.approx([0.5**2 + 1.5**2])
    # A response of two tokens counts as their sum: h = 1 + 1.
    pair = {"label": [1, -1], "ref_log_probs": [-2.0, -2.0, -1.0]}
    loss = generator_loss(0.5)
    _, metrics = loss(
        ModelOutput(log_probs=torch.tensor([-1.0, -1.0, -4.0], dtype=torch.float64)), micro_batch(pair, [2, 1], [0, 0])
    )
    assert metrics["margin"].tolist() == [0.5 * 2 + 0.5 * 3]


def test_margins_of_mapl_are_of_whole_responses() -> None:
    # m_a = 0.5 (2 - 0), m_b = 0.5 (0 - 1): rows of two tokens, h the sum of both.
    columns = {"sign": [1.0, -1.0, -1.0, 1.0], "ref_log_probs": [-2.0, -2.0, -1.0, -1.0, -1.0, -1.0, -2.0, -1.0]}
    found = of_rows(further_apart(0.5), [-1.0] * 8, columns, [2] * 4, [0] * 4)
    assert found == pytest.approx([-log_sigmoid(0.5 * 2 - 0.5 * (0 - 1))])


def test_gaps_of_four_rows_that_all_have_a_score() -> None:
    # Rows (w | w) 1, (l | w) -2, (w | l) 3, (l | l) 0.5: 3 - 1, 3 - 0.5, 1 + 2, 0.5 + 2.
    columns = {"label": [1, -1, 1, -1], "shown_label": [1, 1, -1, -1]}
    model = ModelOutput(scores=torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64))
    value, _ = gap_loss()(model, micro_batch(columns, [1] * 4, [0] * 4))
    assert value.tolist() == pytest.approx([-sum(map(log_sigmoid, (2, 2.5, 3, 2.5)))])


def test_predicted_wins_take_a_label_as_a_sign() -> None:
    batch = Batch(
        {
            "rewards": numbers(1, 1 + log(3), 2, 0),
            "label": numbers(-1, 1, 1, -1, dtype="int8"),
            "group_id": numbers(0, 0, 1, 1, dtype="int64"),
        }
    )
    made = predicted_wins(batch)
    assert values(made.columns, "win") == pytest.approx([0.75, 0.75, sigmoid(2), sigmoid(2)])
    assert made.metrics["label_agreement"].value == 1


def test_what_one_pair_told_is_less_worth_in_the_next() -> None:
    # Features (3, 0), (2, 2), (0, 2.5), ridge 1. The first: 9 > 8 > 6.25. Then the inverse is diag(1/10, 1):
    # (2, 2) tells 0.4 + 4 = 4.4, (0, 2.5) tells 6.25.
    hidden = [[3.0, 0.0], [0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [0.0, 2.5], [0.0, 0.0]]
    batch = Batch(
        {
            "hidden": Column(np.array(hidden, np.float32), np.arange(7)),
            "response_mask": masked(*[1] * 6),
            "label": numbers(1, -1, 1, -1, 1, -1, dtype="int8"),
            "group_id": numbers(0, 0, 1, 1, 2, 2, dtype="int64"),
        }
    )
    result = most_informative(batch, share=2 / 3, ridge=1.0)
    assert result.keep is not None and result.keep.tolist() == [0, 1, 4, 5]
    assert result.metrics["log_det_gain"].value == pytest.approx(log(10) + log(7.25))


# --- rewards ----------------------------------------------------------------------------------------------------
def test_lengths_on_both_sides_of_the_wanted_one_and_a_rule_of_a_half() -> None:
    batch = Batch({"rewards": numbers(2, 2), "response_mask": masked(3, 5)})
    found = by_length(batch, shape="only_length", price=0.0, longest=4)
    assert values(found, "rewards") == [0.75, 0.75]
    mine = Batch({"rewards": numbers(0, 0), "second": numbers(0.6, 0.5), "group_id": numbers(0, 0, dtype="int64")})
    theirs = Batch({"rewards": numbers(0), "second": numbers(1), "group_id": numbers(0, dtype="int64")})
    made = against_references(mine, theirs, shape="crpg", properties=2)
    assert values(made.columns, "rewards") == [0.5, 0]  # feasible above a half


def test_a_running_deviation_counts_every_reward_once() -> None:
    # 1, 3, then 5: mean 3, deviation sqrt(8/3).
    spread = Spread()
    seen, first = spread.scale(spread.initial(Shaped()), Batch({"rewards": numbers(1, 3)}))
    _, second = spread.scale(seen, Batch({"rewards": numbers(5)}))
    assert values(first.columns, "rewards") == [1, 3]
    assert values(second.columns, "rewards") == pytest.approx([5 / (8 / 3) ** 0.5])


def test_words_said_twice_count_twice() -> None:
    # (a 2, b 1) and (a 1, c 2): 2 / sqrt(5 * 5).
    assert words_in_common("", "a c c", "a a b") == pytest.approx(2 / 5)


def test_a_critic_of_a_solution_that_nobody_could_check_has_no_reward() -> None:
    batch = Batch(
        {
            "choice": numbers(1, 0, 0, 1),
            "parsed": numbers(1, 1, 1, 0),
            "solved": numbers(1, MISSING, 0.0, 1),
            "refined": numbers(0.5, 1, 0.25, 0),
        }
    )
    made = verdict_and_use(batch, coef=2.0, right=0.5)
    rewards = made.columns["rewards"].values
    assert is_missing(rewards).tolist() == [False, True, False, False] and rewards[[0, 2, 3]].tolist() == [2, 1.5, 0]
    assert made.metrics["verdict_right"].value == pytest.approx(2 / 3)
