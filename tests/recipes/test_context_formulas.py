"""Recipes on given pairs under other prompts, goals, degrees and labels, against values worked by hand."""

from __future__ import annotations

from math import exp, log
from typing import Any

import numpy as np
import pytest
import torch

from recipes.evaluation.credit_beam import begun, best_beams, compared, grown, whole
from recipes.preference._pairs import soft_pairs, without_reference
from recipes.preference.dppo import predicted_wins
from recipes.preference.mapl import further_apart, pairs_of_pairs, prompt_pairs
from recipes.preference.reward_augmented import under_goals
from recipes.preference.spo_degree import degree_loss, thinned
from recipes.preference.srpo import generator_loss, reviser_loss, revisions
from recipes.preference.t_reg import contrast, token_regulariser
from recipes.preference.typo import kl_from_reference
from recipes.supervised.ift import discounted_count, mixed_context, weighted_nll
from recipes.supervised.sft import divergence_loss
from rlhf_dist.algorithms import dpo, ipo, nll, simpo
from rlhf_dist.algorithms.contract import ModelOutput
from rlhf_dist.batch import Batch, Column
from tests.recipes.rows import gradient, masked, micro_batch, numbers, of_rows, ragged, values


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def log_sigmoid(x: float) -> float:
    return -log(1 + exp(-x))


# A pair: chosen of 2 tokens, log pi = -1 - 2 = -3, log pi_ref = -4; rejected of 1 token, log pi -2, log pi_ref -1.5.
# h(w) = 1, h(l) = -0.5, D = 1.5; beta = 0.5: beta D = 0.75. Means of log pi: -1.5 and -2.
LOG_PROBS = [-1.0, -2.0, -2.0]
PAIR: dict[str, Any] = {"label": [1, -1], "ref_log_probs": [-2.0, -2.0, -1.5]}
SHAPE = ([2, 1], [0, 0])


def test_soft_labels_weigh_both_orders_of_a_pair() -> None:
    soft = {**PAIR, "win": [0.75, 0.75]}
    expected = -0.75 * log_sigmoid(0.75) - 0.25 * log_sigmoid(-0.75)
    assert of_rows(soft_pairs(0.5), LOG_PROBS, soft, *SHAPE) == pytest.approx([expected])
    # Means: 2 (-1.5 + 2) = 1.
    expected = -0.75 * log_sigmoid(1) - 0.25 * log_sigmoid(-1)
    assert of_rows(soft_pairs(2.0, kind="mean"), LOG_PROBS, soft, *SHAPE) == pytest.approx([expected])


def test_sure_labels_are_dpo_and_simpo_without_its_margin() -> None:
    sure = {**PAIR, "win": [1.0, 1.0]}
    assert of_rows(soft_pairs(0.5), LOG_PROBS, sure, *SHAPE) == of_rows(dpo(0.5), LOG_PROBS, PAIR, *SHAPE)
    assert of_rows(soft_pairs(2.0, kind="mean"), LOG_PROBS, sure, *SHAPE) == pytest.approx(
        of_rows(simpo(2.0, 0.0), LOG_PROBS, PAIR, *SHAPE)
    )


def test_a_predictor_says_how_likely_a_label_is_right() -> None:
    # r(w) - r(l): log 3, so that p = 3/4; then -log 3, p = 1/4: the predictor is against that label.
    batch = Batch(
        {
            "rewards": numbers(log(3), 0, 0, log(3)),
            "label": numbers(1, -1, 1, -1, dtype="int8"),
            "group_id": numbers(5, 5, 6, 6, dtype="int64"),
        }
    )
    made = predicted_wins(batch)
    np.testing.assert_allclose(values(made.columns, "win"), [0.75, 0.75, 0.25, 0.25], rtol=1e-6)
    assert made.metrics["label_agreement"].value == 0.5
    assert predicted_wins(batch.slice(0, 0)).columns.num_rows == 0


def test_each_pair_is_under_the_goal_of_either_reward() -> None:
    batch = Batch(
        {
            "rewards": numbers(2, 0.5, np.nan, 1, 0, 1),
            "label": numbers(1, -1, 1, -1, -1, 1, dtype="int8"),
            "group_id": numbers(3, 3, 4, 4, 0, 0, dtype="int64"),
        }
    )
    made = under_goals(batch)
    assert made.parent is not None and made.parent.tolist() == [0, 1, 1, 0, 5, 4, 4, 5]
    assert values(made.columns, "label") == [1, -1] * 4
    assert values(made.columns, "goal") == [2, 2, 0.5, 0.5, 1, 1, 0, 0]
    assert values(made.columns, "group_id") == [3, 3, -4, -4, 0, 0, -1, -1]
    assert made.metrics["unscored"].value == 1 and made.metrics["reward_disagrees"].value == 0


def test_typo_compares_by_the_policy_alone_and_is_held_by_what_the_reference_says() -> None:
    # log pi(w) - log pi(l) = -1, whatever the reference; log pi_ref - log pi: -4 + 3 and -1.5 + 2.
    assert of_rows(without_reference("cpo", 1.0, nll_coef=0.0), LOG_PROBS, PAIR, *SHAPE) == pytest.approx(
        [-log_sigmoid(-1)]
    )
    assert of_rows(kl_from_reference(), LOG_PROBS, PAIR, [2, 1]) == [-1.0, 0.5]
    assert gradient(kl_from_reference(), LOG_PROBS, PAIR, [2, 1]) == [-1.0] * 3  # of maximum likelihood


def test_degrees_take_the_rarest_tokens_first_and_leave_the_last() -> None:
    # Of chosen tokens 7 is there three times, 5 twice, 6 and 8 once; the last of each, an end, stays.
    batch = Batch(
        {
            "response_ids": ragged([7, 5, 6, 7, 2], [9, 9, 2], [7, 5, 8, 2], dtype="int32"),
            "label": numbers(1, -1, 1, dtype="int8"),
        }
    )
    made = thinned(batch)
    assert made.parent is not None and made.parent.tolist() == [0] * 4 + [2] * 4
    assert values(made.columns, "degree") == [0, 1, 2, 3] * 2
    # Of 4 tokens 0, 1, 2, 3 go: 6, then 5, then the first 7. Of 3: round(0.75) = 1, round(1.5) = 2, round(2.25) = 2.
    expected = [[7, 5, 6, 7, 2], [7, 5, 7, 2], [7, 7, 2], [7, 2], [7, 5, 8, 2], [7, 5, 2], [7, 2], [7, 2]]
    assert [row.tolist() for row in made.columns["response_ids"].rows()] == expected
    assert made.columns["response_mask"].values.sum() == sum(map(len, expected))


def test_a_degree_is_named_by_a_softmax() -> None:
    # Logits (log 2, 0, 0, 0): chances 2/5 and three times 1/5.
    logits = torch.tensor([[log(2), 0, 0, 0]] * 2, dtype=torch.float64)
    model = ModelOutput(heads={"degree": logits})
    value, metrics = degree_loss()(model, micro_batch({"degree": [0, 3]}, [1, 1]))
    assert value.tolist() == pytest.approx([-log(2 / 5), -log(1 / 5)])
    assert metrics["degree_accuracy"].tolist() == [1, 0]


MARGINS = {
    "prompt_ids": ragged([1], [1], [2], [2], [3], [3], dtype="int32"),
    "label": numbers(1, -1, -1, 1, 1, -1, dtype="int8"),
    "margin": numbers(1, 1, 3, 3, 2, 2),
    "group_id": numbers(0, 0, 7, 7, 9, 9, dtype="int64"),
}


def test_a_response_is_preferred_under_its_own_prompt() -> None:
    made = prompt_pairs(Batch(MARGINS))
    assert made.parent is not None and made.parent.tolist() == [0, 0, 3, 3, 4, 4]
    assert [row.tolist() for row in made.columns["prompt_ids"].rows()] == [[1], [2], [2], [3], [3], [1]]
    assert values(made.columns, "label") == [1, -1] * 3
    assert prompt_pairs(Batch(MARGINS).slice(0, 2)).columns.num_rows == 0


def test_of_two_pairs_the_stronger_is_to_be_further_apart() -> None:
    made = pairs_of_pairs(Batch(MARGINS))
    assert made.keep is not None and made.keep.tolist() == [0, 1, 2, 3]  # the third pair is alone
    # The second pair has the larger margin: its labels as they are, those of the first turned.
    assert values(made.columns, "sign") == [-1, 1, -1, 1] and values(made.columns, "group_id") == [0] * 4
    equal = pairs_of_pairs(Batch({**MARGINS, "margin": numbers(1, 1, 1, 1, 2, 2)}))
    assert equal.columns.num_rows == 0 and equal.metrics["equal_margins"].value == 1
    # h: 1, 0, -0.5, 1; signed: -1 + 0 + 0.5 + 1 = 0.5; times beta 0.5.
    columns = {"sign": [-1, 1, -1, 1], "ref_log_probs": [-2.0, -2.0, -1.5, -4.0]}
    found = of_rows(further_apart(0.5), [-1.0, -2.0, -2.0, -3.0], columns, [1] * 4, [0] * 4)
    assert found == pytest.approx([-log_sigmoid(0.25)])
    scored = ModelOutput(scores=torch.tensor([1.0, 0.0, -0.5, 1.0], dtype=torch.float64))
    value, _ = further_apart(scores=True)(scored, micro_batch(columns, [1] * 4, [0] * 4))
    assert value.tolist() == pytest.approx([-log_sigmoid(0.5)])


def test_srpo_shows_either_response_and_revises_to_either() -> None:
    batch = Batch(
        {
            "response_ids": ragged([5, 2], [6, 2], dtype="int32"),
            "response_mask": masked(2, 2),
            "label": numbers(1, -1, dtype="int8"),
            "group_id": numbers(0, 0, dtype="int64"),
        }
    )
    made = revisions(batch)
    assert made.parent is not None and made.parent.tolist() == [0, 0, 1, 1]
    assert [row.tolist() for row in made.columns["response_ids"].rows()] == [[5, 2], [6, 2], [5, 2], [6, 2]]
    assert values(made.columns, "label") == [1, -1, 1, -1] and values(made.columns, "shown_label") == [1, 1, -1, -1]
    # h(w | w) = 1, h(l | w) = 0, h(w | l) = 2, h(l | l) = -1, beta 0.5: (0.5 * 3 - 0.5)^2 + (0.5 * -1 + 0.5)^2.
    shown = {"label": [1, -1, 1, -1], "shown_label": [1, 1, -1, -1], "ref_log_probs": [-2.0, -3.0, -4.0, -1.0]}
    found = of_rows(reviser_loss(0.5), [-1.0, -3.0, -2.0, -2.0], shown, [1] * 4, [0] * 4)
    assert found == pytest.approx([1.0])


def test_srpos_generator_is_beta_squared_times_ipo() -> None:
    assert of_rows(generator_loss(0.5), LOG_PROBS, PAIR, *SHAPE) == pytest.approx([(0.75 - 0.5) ** 2])
    scaled = [0.25 * one for one in of_rows(ipo(0.5), LOG_PROBS, PAIR, *SHAPE)]
    assert of_rows(generator_loss(0.5), LOG_PROBS, PAIR, *SHAPE) == pytest.approx(scaled)


def test_t_regs_token_rewards_are_a_sigmoid_less_a_half() -> None:
    batch = Batch(
        {
            "better_log_probs": ragged([-1.0, -1.0], [-2.0]),
            "worse_log_probs": ragged([-1.0 - log(3), -1.0], [-2.0 + log(3)]),
        }
    )
    made = contrast(batch)
    np.testing.assert_allclose(values(made.columns, "token_rewards"), [0.25, 0, -0.25], atol=1e-7)
    assert made.metrics["token_reward_size"].value == pytest.approx(0.5 / 3)
    # log pi/pi_ref: 1, 0, -0.5. -(0.25 * 1 + 0 + -0.25 * -0.5).
    rewarded = {**PAIR, "token_rewards": [0.25, 0.0, -0.25]}
    assert of_rows(token_regulariser(), LOG_PROBS, rewarded, *SHAPE) == pytest.approx([-0.375])


def test_divergences_have_the_gradient_of_the_likelihood_where_the_policy_is_sure() -> None:
    # pi = 1/4: 2 (1 - 1/2) = 1 and 4 - 1 = 3; to log pi the gradients are -sqrt(pi) = -1/2 and -1 / pi = -4.
    for kind, value, slope in (("hellinger", 1.0, -0.5), ("pearson", 3.0, -4.0)):
        loss = divergence_loss(kind)  # type: ignore[arg-type]
        assert of_rows(loss, [log(0.25)], {}, [1]) == pytest.approx([value])
        assert gradient(loss, [log(0.25)], {}, [1]) == pytest.approx([slope])
        assert gradient(loss, [0.0], {}, [1]) == pytest.approx(gradient(nll(), [0.0], {}, [1]))


def test_a_context_is_partly_the_policys_own_and_its_labels_are_the_datas() -> None:
    batch = Batch(
        {
            "response_ids": ragged([5, 6, 2], [7, 2], dtype="int32"),
            "response_mask": ragged([1, 0, 1], [1, 1], dtype="uint8"),
            "top_ids": Column(np.array([[9], [9], [9], [8], [2]], np.int32), np.array([0, 3, 5])),
        }
    )
    all_own = mixed_context(batch, mix=1.0, rng=np.random.default_rng(0))
    assert [row.tolist() for row in all_own.columns["response_ids"].rows()] == [[9, 6, 9], [8, 2]]
    assert all_own.columns["gold_ids"].values.tolist() == [[5], [6], [2], [7], [2]]
    assert all_own.metrics["changed"].value == 3 / 5
    none = mixed_context(batch, mix=0.0, rng=np.random.default_rng(0))
    assert values(none.columns, "response_ids") == [5, 6, 2, 7, 2]


def test_a_token_weighs_as_much_as_leads_to_it_and_without_discount_it_is_sft() -> None:
    batch = Batch({"response_mask": masked(3, 1)})
    np.testing.assert_allclose(values(discounted_count(batch, discount=0.5), "token_weight"), [0.5, 0.75, 0.875, 0.5])
    assert values(discounted_count(batch, discount=0.0), "token_weight") == [1] * 4
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1.0"):
        discounted_count(batch, discount=1.0)
    at = torch.tensor([[-1.0], [-2.0]], dtype=torch.float64)
    value, _ = weighted_nll()(ModelOutput(log_probs_at={"gold_ids": at}), micro_batch({"token_weight": [0.5, 1]}, [2]))
    assert value.tolist() == [0.5, 2.0]


def test_beams_grow_by_their_credits_and_the_best_are_kept() -> None:
    prompts = Batch({"prompt_ids": ragged([1, 3], dtype="int32")})
    start = begun(prompts)
    assert values(start, "credit") == [0] and values(start, "open") == [1]
    # Credits: 0.5 (1 + 0.5) = 0.75 and 0.5 (-1) of the token that counts, on 1 and 0.
    batch = Batch(
        {
            "prompt_ids": ragged([1, 3], [1, 3], dtype="int32"),
            "base_ids": ragged([1, 3], [1, 3], dtype="int32"),
            "response_ids": ragged([5, 6], [7, 2], dtype="int32"),
            "log_probs": ragged([-1, -1], [-2, -3]),
            "ref_log_probs": ragged([-2, -1.5], [-1, 0]),
            "response_mask": ragged([1, 1], [1, 0], dtype="uint8"),
            "response": Column.strings(["ab", "c"]),
            "said": Column.strings(["x", "y"]),
            "credit": numbers(1, 0),
            "finished": numbers(0, 1, dtype="uint8"),
            "group_id": numbers(4, 4, dtype="int64"),
        }
    )
    made = grown(batch, beta=0.5)
    assert values(made.columns, "credit") == [1.75, -0.5] and values(made.columns, "open") == [1, 0]
    assert made.columns["said"].rows() == ["xab", "yc"]
    assert [row.tolist() for row in made.columns["prompt_ids"].rows()] == [[1, 3, 5, 6], [1, 3, 7, 2]]
    assert made.metrics["token_credit"].value == pytest.approx((0.5 + 0.25 - 0.5) / 3)
    grew = Batch({**{name: batch[name] for name in batch}, **{name: made.columns[name] for name in made.columns}})
    best = best_beams(grew, beams=1)
    assert best.keep is not None and best.keep.tolist() == [0]
    ended = whole(grew)
    assert [row.tolist() for row in ended["response_ids"].rows()] == [[5, 6], [7, 2]]
    assert [row.tolist() for row in ended["prompt_ids"].rows()] == [[1, 3]] * 2
    rewards = {"rewards": numbers(1, 0), "plain_rewards": numbers(0, 0), "credit": numbers(2, 1)}
    measured = {name: one.value for name, one in compared(Batch(rewards)).metrics.items()}
    assert measured == {"beam_reward": 0.5, "plain_reward": 0, "beam_wins": 0.75, "implicit_reward": 1.5}
