"""Recipes on pairs of samples, reward models, votes, writers and measurements against values worked by hand."""

from __future__ import annotations

import json
from math import exp, log, sqrt
from typing import Any

import numpy as np
import pytest
import torch

from recipes.constrained.multipliers import Constrained, Multipliers, weighed
from recipes.evaluation.best_of_list import found_right
from recipes.evaluation.diversity import distinct
from recipes.evaluation.pair_accuracy import accuracies
from recipes.online_preference._sample_pairs import (
    first_two,
    sample_pair_loss,
    wide_pairs,
    win_regression,
    wins_in_group,
)
from recipes.online_preference.active import furthest_apart, most_unsure
from recipes.online_preference.cream import consistent_dpo, kendall, self_rewards
from recipes.online_preference.density_ratio import log_density_ratio
from recipes.online_preference.iterative_dpo import less_for_length
from recipes.online_preference.likelihood_reward import followed_up, likelihoods
from recipes.online_preference.pmpo import good_and_bad, weighted_likelihood
from recipes.online_preference.rejection_pairs import accepted_pairs
from recipes.online_preference.selm import implicit_reward
from recipes.policy_gradient._prompts import written_prompt
from recipes.reasoning._rewards import bleu, format_and_answer, logic_rl, reaches, tool_calls
from recipes.reasoning.rlccf import agrees_with_vote, answer_of
from recipes.reward_models.armorm import as_numbers, gated_preference, regression
from recipes.reward_models.binary_reward_model import binary_cross_entropy
from recipes.reward_models.denoised import strength_loss, strengths
from recipes.reward_models.general_preference import skew_preference
from recipes.reward_models.grm import generative_reward
from recipes.reward_models.heron import first_that_decides
from recipes.reward_models.reward_model import scaled_bradley_terry
from recipes.reward_models.robust import augmented, pair_or_tie
from recipes.reward_models.weak_to_strong import Confidence, WeakToStrong, confident, weak_labels
from rlhf_dist.algorithms import dpo
from rlhf_dist.algorithms.contract import ModelOutput
from rlhf_dist.batch import Batch, Column
from tests.recipes.rows import gradient, masked, micro_batch, numbers, of_rows, ragged, values


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def log_sigmoid(x: float) -> float:
    return -log(1 + exp(-x))


# Two responses of a token: log pi -1, -2; log pi_t -2, -2; log pi_ref -3, -1; rewards 1 and 0.5. D_t: 1 and 0.
SAID = [-1.0, -2.0]
PAIR: dict[str, Any] = {
    "label": [1, -1],
    "old_log_probs": [-2.0, -2.0],
    "ref_log_probs": [-3.0, -1.0],
    "rewards": [1.0, 0.5],
    "win": [0.5, -0.5],
}
SHAPE = ([1, 1], [0, 0])


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("rebel", {"eta": 0.5}, (1 / 0.5 - 0.5) ** 2),
        # R: 1 - 0.1 * 2 and 0.5 - 0.1 * -1; the gap 0.2 times -1 + 2.
        ("copg", {"beta": 0.1}, -0.2 * 1),
        # r: 1 - 0.1 * 1 and 0.5 - 0.1 * -1: half the gap 0.15, the ratio e cut at 1.2.
        ("p3o", {"beta": 0.1}, -1.2 * 0.15),
        # h: -1 - (-3 - 2 * 2) / 3 and -2 - (-1 - 2 * 2) / 3, 1 / (2 eta) = 1.
        ("inpo", {"eta": 0.5}, (4 / 3 + 1 / 3 - 1) ** 2),
        ("dno", {"eta": 0.5}, -sigmoid(1) * log_sigmoid(0.5) - sigmoid(-1) * log_sigmoid(-0.5)),
    ],
)
def test_a_loss_on_two_samples(kind: str, settings: dict[str, float], expected: float) -> None:
    assert of_rows(sample_pair_loss(kind, **settings), SAID, PAIR, *SHAPE) == pytest.approx([expected])  # type: ignore[arg-type]


def test_losses_on_samples_do_not_know_which_is_first_nor_a_shift_of_rewards() -> None:
    turned = {**PAIR, "label": [-1, 1]}
    shifted = {**PAIR, "rewards": [4.0, 3.5]}
    for kind in ("rebel", "copg", "p3o", "dno"):
        loss = sample_pair_loss(kind)  # type: ignore[arg-type]
        plain = of_rows(loss, SAID, PAIR, *SHAPE)
        assert of_rows(loss, SAID, shifted, *SHAPE) == pytest.approx(plain)
        if kind != "p3o":  # which cuts the ratio of the first to the second
            assert of_rows(loss, SAID, turned, *SHAPE) == pytest.approx(plain)


def test_on_policy_the_gradients_are_those_of_reinforce_on_pairs() -> None:
    here = {**PAIR, "old_log_probs": SAID}
    # copg: -(R - R') and its negative; p3o: half of that.
    assert gradient(sample_pair_loss("copg", beta=0.0), SAID, here, *SHAPE) == pytest.approx([-0.5, 0.5])
    assert gradient(sample_pair_loss("p3o", beta=0.0), SAID, here, *SHAPE) == pytest.approx([-0.25, 0.25])
    # rebel: 2 (0 - gap) / eta.
    assert gradient(sample_pair_loss("rebel", eta=0.5), SAID, here, *SHAPE) == pytest.approx([-2.0, 2.0])


def test_inpo_with_one_reference_is_ipo_and_sppo_regresses_on_wins() -> None:
    one = sample_pair_loss("inpo", eta=0.5, reference_share=1.0)
    assert of_rows(one, SAID, PAIR, *SHAPE) == pytest.approx([(2 + 1 - 1) ** 2])
    assert of_rows(win_regression(4.0), SAID, PAIR, [1, 1]) == pytest.approx([(1 - 2) ** 2, (0 + 2) ** 2])


def test_pairs_and_wins_of_samples() -> None:
    batch = Batch({"rewards": numbers(1, 3, 2, 0, 0), "group_id": numbers(0, 0, 0, 1, 1, dtype="int64")})
    np.testing.assert_allclose(values(wins_in_group(batch), "win"), [-0.5, 0.5, 0, 0, 0])
    result = first_two(batch)
    assert result.keep is not None and result.keep.tolist() == [0, 1, 3, 4]
    assert values(result.columns, "label") == [1, -1, 1, -1]
    pairs = Batch({"margin": numbers(1, 1, 0.2, 0.2), "group_id": numbers(0, 0, 1, 1, dtype="int64")})
    assert wide_pairs(pairs, least=0.5).keep.tolist() == [0, 1]  # type: ignore[union-attr]
    priced = less_for_length(Batch({"rewards": numbers(1, 1), "response_mask": masked(2, 5)}), price=0.1)
    np.testing.assert_allclose(values(priced, "rewards"), [0.8, 0.5])


def test_selm_and_the_density_ratio_are_log_ratios() -> None:
    assert of_rows(implicit_reward(), [-1.0, -2.0, -3.0], {"ref_log_probs": [-2.0, -2.0, -1.0]}, [2, 1]) == [1.0, -2.0]
    batch = Batch(
        {
            "strong_log_probs": ragged([-1, -1], [-2]),
            "weak_log_probs": ragged([-2, -3], [-1]),
            "response_mask": ragged([1, 0], [1], dtype="uint8"),
        }
    )
    assert values(log_density_ratio(batch), "rewards") == [1, -1]


def test_cream_trusts_labels_as_far_as_two_rankings_agree() -> None:
    assert kendall(np.array([1.0, 2, 3]), np.array([1.0, 3, 2])) == pytest.approx(1 / 3)
    batch = Batch(
        {
            "old_log_probs": ragged([-1], [-2], [-3]),
            "previous_log_probs": ragged([-2], [-3], [-1]),
            "ref_log_probs": ragged([-4], [-4], [-4]),
            "response_mask": masked(1, 1, 1),
            "group_id": numbers(0, 0, 0, dtype="int64"),
        }
    )
    # Own ratios 3, 2, 1; before 2, 1, 3: one pair agrees, two do not: tau = -1/3, C = 1/3.
    made = self_rewards(batch).columns
    assert values(made, "rewards") == [3, 2, 1]
    np.testing.assert_allclose(values(made, "consistency"), [1 / 3] * 3)
    rows = {"label": [1, -1], "previous_log_probs": [-2.0, -2.0], "consistency": [0.75, 0.75]}
    # h 1 and 0, beta 0.5.
    found = of_rows(consistent_dpo(0.5), SAID, rows, *SHAPE)
    assert found == pytest.approx([-0.75 * log_sigmoid(0.5) - 0.25 * log_sigmoid(-0.5)])
    sure = {**rows, "consistency": [1.0, 1.0]}
    assert of_rows(consistent_dpo(0.5), SAID, sure, *SHAPE) == pytest.approx(
        of_rows(dpo(0.5), SAID, {"label": [1, -1], "ref_log_probs": [-2.0, -2.0]}, *SHAPE)
    )


def test_rejection_sampling_accepts_by_the_rewards_distance_to_the_best() -> None:
    # Chances exp((r - 2) / 1): 1, e^-1, e^-2; the pair is of the best and another that was accepted.
    batch = Batch({"rewards": numbers(2, 1, 0), "group_id": numbers(0, 0, 0, dtype="int64")})
    rng = np.random.default_rng(0)
    results = [accepted_pairs(batch, temperature=1.0, rng=rng) for _ in range(3000)]
    accepted = np.mean([result.metrics["accepted"].value * 3 for result in results])
    assert accepted == pytest.approx(1 + exp(-1) + exp(-2), abs=0.04)
    for result in results:
        assert result.keep is not None
        assert len(result.keep) in (0, 2)
        if len(result.keep):
            won, lost = values(result.columns, "label").index(1), values(result.columns, "label").index(-1)
            rewards = values(batch, "rewards")
            assert rewards[result.keep[won]] > rewards[result.keep[lost]]
    assert all(len(accepted_pairs(batch, temperature=1e-3, rng=rng).columns["label"].values) == 0 for _ in range(20))


def test_active_choice_by_entropy_and_then_by_distance() -> None:
    batch = Batch(
        {
            "entropy": ragged([1, 1], [1], [3], [3], [2], [2]),
            "old_log_probs": ragged([-1, -1], [-1], [-1], [-5], [-1], [-2]),
            "ref_log_probs": ragged([-1, -1], [-1], [-1], [-1], [-1], [-1]),
            "response_mask": masked(2, 1, 1, 1, 1, 1),
            "group_id": numbers(0, 0, 1, 1, 2, 2, dtype="int64"),
        }
    )
    assert most_unsure(batch, share=2 / 3).keep.tolist() == [2, 3, 4, 5]  # type: ignore[union-attr]
    assert furthest_apart(batch, share=1 / 3).keep.tolist() == [2, 3]  # type: ignore[union-attr]


def test_pmpo_shares_its_weights_among_each_side() -> None:
    batch = Batch({"rewards": numbers(2, 0, 0, 1, 1), "group_id": numbers(0, 0, 0, 1, 1, dtype="int64")})
    np.testing.assert_allclose(values(good_and_bad(batch, alpha=0.75), "weight"), [0.75, -0.125, -0.125, 0, 0])
    found = of_rows(weighted_likelihood(), [-1.0, -2.0, -4.0], {"weight": [0.75, -0.125, -0.125]}, [1, 1, 1], [0, 0, 0])
    assert found == pytest.approx([0.75 - 0.125 * 2 - 0.125 * 4])


def test_follow_ups_are_put_behind_a_response_and_summed_with_their_signs() -> None:
    batch = Batch(
        {
            "prompt_ids": ragged([1], [2, 3], dtype="int32"),
            "response_ids": ragged([4, 99], [5], dtype="int32"),
            "finished": numbers(1, 0, dtype="uint8"),
        }
    )
    followups = Batch(
        {
            "prompt_ids": ragged([7], [7], dtype="int32"),
            "response_ids": ragged([8], [9, 9], dtype="int32"),
            "response_mask": masked(1, 2),
            "sign": numbers(1, -1),
        }
    )
    made = followed_up(batch, followups)
    assert [row.tolist() for row in made.columns["prompt_ids"].rows()] == [
        [1, 4, 7],
        [1, 4, 7],
        [2, 3, 5, 7],
        [2, 3, 5, 7],
    ]
    assert [row.tolist() for row in made.columns["response_ids"].rows()] == [[8], [9, 9], [8], [9, 9]]
    assert made.parent is not None and made.parent.tolist() == [0, 0, 1, 1]
    said = Batch(
        {
            "parent_id": numbers(10, 10, 11, 11, dtype="int64"),
            "sign": numbers(1, -1, 1, -1),
            "log_probs": ragged([-1], [-1, -2], [-4], [-1, 0]),
            "response_mask": masked(1, 2, 1, 2),
        }
    )
    rows = Batch({"row_id": numbers(10, 11, dtype="int64"), "group_id": numbers(0, 1, dtype="int64")})
    assert values(likelihoods(rows, said), "rewards") == [2, -3]


def test_a_hint_becomes_a_prompt() -> None:
    hints = Batch(
        {
            "prompt_ids": ragged([1], [2], [3], dtype="int32"),
            "response_ids": ragged([4, 99], [5], [99], dtype="int32"),
            "finished": numbers(1, 0, 1, dtype="uint8"),
        }
    )
    rows = lambda made: [row.tolist() for row in made["prompt_ids"].rows()]  # noqa: E731
    assert rows(written_prompt(hints, keep_prompt=True)) == [[1, 4], [2, 5], [3]]
    assert rows(written_prompt(hints, keep_prompt=False)) == [[4], [5], [3]]


def test_multipliers_rise_below_their_point_and_fall_above_it() -> None:
    state = Multipliers()
    held = state.initial(Constrained(multiplier=0.5))
    batch = Batch({"rewards": numbers(0, 1), "second_rewards": numbers(2, 2)})
    held, _ = state.update(held, batch, first=1.0, second=1.0, lr=0.1)
    assert (held["first"], held["second"]) == pytest.approx((0.55, 0.4)) and held["mu_first"] == pytest.approx(
        np.tanh(0.55)
    )
    both = Batch({"advantages": ragged([1, 2]), "second_advantages": ragged([3, -1])})
    assert values(weighed(both, first=0.5, second=-1.0), "advantages") == [-2.5, 2]


# --- reward models -------------------------------------------------------------------------------------------
def scored(
    loss: Any, scores: list[float], columns: dict[str, list[float]], groups: list[int] | None = None
) -> list[float]:
    model = ModelOutput(scores=torch.tensor(scores, dtype=torch.float64))
    found: list[float] = loss(model, micro_batch(columns, [1] * len(scores), groups))[0].tolist()
    return found


def test_a_pairs_strength_scales_shifts_softens_or_turns_its_loss() -> None:
    pair = {"label": [1.0, -1.0], "margin": [3.0, 3.0], "strength": [-0.5, -0.5]}
    assert scored(scaled_bradley_terry(), [2, 1], pair, [0, 0]) == pytest.approx([-3 * log_sigmoid(1)])
    assert scored(strength_loss("margin"), [2, 1], pair, [0, 0]) == pytest.approx([-log_sigmoid(1.5)])
    soft = -sigmoid(-0.5) * log_sigmoid(1) - sigmoid(0.5) * log_sigmoid(-1)
    assert scored(strength_loss("soft"), [2, 1], pair, [0, 0]) == pytest.approx([soft])
    assert scored(strength_loss("flip"), [2, 1], pair, [0, 0]) == pytest.approx([-log_sigmoid(-1)])
    votes = {"vote_1": numbers(1, 2), "vote_2": numbers(3, 0), "vote_3": numbers(1, 0)}  # gaps -1, 3, 1
    batch = Batch({**votes, "label": numbers(1, -1, dtype="int8"), "group_id": numbers(0, 0, dtype="int64")})
    made = strengths(batch)
    assert values(made.columns, "strength") == [1, 1]
    assert made.metrics["strength_deviation"].value == pytest.approx(np.std([-1, 3, 1]))


def test_a_binary_reward_model_and_grms_two_regularisers() -> None:
    found = scored(binary_cross_entropy(), [2, 1], {"desirable": [1.0, 0.0]})
    assert found == pytest.approx([-log_sigmoid(2), -log_sigmoid(-1)])
    model = ModelOutput(log_probs=torch.tensor([-1.0, -3.0, -2.0]), heads={"reward": torch.tensor([2.0, 1.0])})
    rows = micro_batch({"label": [1, -1]}, [2, 1], [0, 0])
    sft, _ = generative_reward(0.1)(model, rows)
    assert sft.item() == pytest.approx(-0.9 * log_sigmoid(1) + 0.1 * 2)  # mean log-prob of the chosen: -2
    text, _ = generative_reward(0.1, regulariser="dpo_noref", beta=0.5)(model, rows)
    assert text.item() == pytest.approx(-0.9 * log_sigmoid(1) - 0.1 * log_sigmoid(-1))  # 0.5 (-4 + 2)


def test_a_strong_model_mixes_weak_labels_with_its_own_hardened_ones() -> None:
    pairs = Batch(
        {
            "weak_rewards": numbers(0, 1),
            "label": numbers(1, -1, dtype="int8"),
            "group_id": numbers(0, 0, dtype="int64"),
        }
    )
    np.testing.assert_allclose(values(weak_labels(pairs), "weak_chance"), [sigmoid(-1)] * 2, rtol=1e-6)
    columns = {"label": [1.0, -1.0], "weak_chance": [0.25, 0.25]}
    # Own answer: the first (2 > 1). Target 0.5 * 0.25 + 0.5 * 1 = 0.625.
    found = scored(confident(0.5), [2, 1], columns, [0, 0])
    assert found == pytest.approx([-0.625 * log_sigmoid(1) - 0.375 * log_sigmoid(-1)])
    held, _ = Confidence().advance(Confidence().initial(WeakToStrong()), pairs, confidence=0.5, warmup=4)
    assert held == {"step": 1.0, "share": 0.125}


def test_rrm_makes_four_pairs_of_each() -> None:
    batch = Batch(
        {
            "response_ids": ragged([1], [2], [3], [4], dtype="int32"),
            "response_mask": masked(1, 1, 1, 1),
            "label": numbers(1, -1, -1, 1, dtype="int8"),
            "group_id": numbers(5, 5, 6, 6, dtype="int64"),
        }
    )
    made = augmented(batch)
    said = [row.tolist()[0] for row in made.columns["response_ids"].rows()]
    assert said == [1, 2, 1, 4, 1, 3, 4, 3, 4, 3, 4, 1, 4, 2, 1, 2]
    assert values(made.columns, "label") == [1, -1] * 8 and values(made.columns, "tie") == [0, 0, 0, 0, 0, 0, 1, 1] * 2
    groups = values(made.columns, "group_id")
    assert groups[:2] == [5, 5] and groups[8:10] == [6, 6] and len(set(groups)) == 8
    assert made.parent is not None and made.parent.tolist() == [0] * 8 + [3] * 8
    assert scored(pair_or_tie(), [2, 1], {"label": [1.0, -1.0], "tie": [1.0, 1.0]}, [0, 0]) == pytest.approx(
        [-(log_sigmoid(1) + log_sigmoid(-1)) / 2]
    )


def test_herons_first_signal_that_tells_two_apart_decides() -> None:
    batch = Batch(
        {
            "signal_1": numbers(1, 0, 1, 1, 1, 1),
            "signal_2": numbers(0, 5, 2, 3, 4, 4),
            "group_id": numbers(0, 0, 1, 1, 2, 2, dtype="int64"),
        }
    )
    result = first_that_decides(batch, thresholds=(0.0, 0.5))
    assert result.keep is not None and result.keep.tolist() == [0, 1, 2, 3]
    assert values(result.columns, "label") == [1, -1, -1, 1]
    assert result.metrics["decided_by_2"].value == pytest.approx(1 / 3)


def test_armorms_regression_and_its_gate() -> None:
    made = as_numbers(Batch({"ratings": Column.strings(["[1, null, 0, 0, 0]"])}))
    assert made["rated"].values.tolist() == [[1, 0, 0, 0, 0]] and made["has_rating"].values.tolist() == [
        [1, 0, 1, 1, 1]
    ]
    with pytest.raises(ValueError, match="5 numbers"):
        as_numbers(Batch({"ratings": Column.strings(["[1]"])}))
    heads = {
        "objectives": torch.tensor([[2.0, 9, 1, 0, 0], [0.0, 0, 0, 0, 0]]),
        "gate": torch.tensor([[log(3.0), 0, -99, -99, -99], [50.0, 0, 0, 0, 0], [0.0] * 5]),
    }
    rows = micro_batch(
        {"label": [1, -1], "rated": [[1, 0, 0, 0, 0], [0] * 5], "has_rating": [[1, 0, 1, 1, 1], [1] * 5]},
        [2, 1],
        [0, 0],
    )
    value, _ = regression()(ModelOutput(heads=heads), rows)
    assert value.tolist() == [2.0, 0.0]  # (2 - 1)^2 + 1; 9 has no rating
    # Gate at the first token: 3/4 and 1/4 on the first two; 0.75 * 2 + 0.25 * 9 = 3.75 against 0; verbosity is 0.
    value, _ = gated_preference(0.1)(ModelOutput(heads=heads), rows)
    assert value.item() == pytest.approx(-log_sigmoid(3.75), rel=1e-5)


def test_gpm_holds_a_preference_that_goes_round() -> None:
    def score(won: list[float], lost: list[float]) -> float:
        model = ModelOutput(heads={"embedding": torch.tensor([won, lost], dtype=torch.float64)})
        return float(skew_preference()(model, micro_batch({"label": [1, -1]}, [1, 1], [0, 0]))[1]["score"])

    at = [[np.cos(angle), np.sin(angle)] for angle in (0.0, 2 * np.pi / 3, 4 * np.pi / 3)]
    around = [score(at[k], at[(k + 1) % 3]) for k in range(3)]
    assert around == pytest.approx([sqrt(3) / 2] * 3)  # the sine of a third of a turn
    assert score(at[1], at[0]) == pytest.approx(-around[0]) and score(at[0], at[0]) == pytest.approx(0)


# --- rules, votes, measurements ------------------------------------------------------------------------------
def test_countdown_wants_a_format_and_an_equation() -> None:
    answer = json.dumps({"numbers": [2, 3, 4], "target": 14})
    said = "<think>hm</think> <answer>{}</answer>"
    assert format_and_answer(said.format("2 + 3 * 4"), answer) == 1.0
    assert format_and_answer(said.format("2 + 12"), answer) == 0.1 and format_and_answer("2 + 3 * 4", answer) == 0.0
    assert (
        not reaches("2 / 0", [2, 0], 1)
        and not reaches("__import__('os')", [1], 1)
        and reaches("(1+2)*3=9", [1, 2, 3], 9)
    )


def test_logic_rls_four_rewards() -> None:
    said = "<think>a</think><answer>{}</answer>"
    assert [logic_rl(said.format("Knight"), "knight"), logic_rl(said.format("knave"), "knight")] == [3.0, -0.5]
    assert [logic_rl(said.format(""), "knight"), logic_rl("knight", "knight")] == [-1.0, -3.0]


def test_bleu_by_hand() -> None:
    assert bleu("the cat sat on", "the cat sat on") == pytest.approx(1.0)
    # "a b" against "a b c d": p1 = 2/2, p2 = (1+1)/(1+1), p3 = p4 = (0+1)/(0+1); brevity exp(1 - 4/2).
    assert bleu("a b", "a b c d") == pytest.approx(exp(-1))
    # "a x" against "a b": p1 = 1/2, p2 = (0+1)/(1+1): (1/4)^(1/4).
    assert bleu("a x", json.dumps(["a b", "c d e"])) == pytest.approx(0.25**0.25)
    assert bleu("", "a") == 0.0 and bleu("x", "a") == 0.0


def test_tool_calls_from_minus_three_to_four() -> None:
    wanted = json.dumps([{"name": "add", "parameters": {"a": 1, "b": 2}}])
    said = '<think>t</think><tool_call>\n{"name": "add", "parameters": {"a": 1, "b": %s}}\n</tool_call>'
    assert tool_calls(said % 2, wanted) == pytest.approx(1 + 3)
    # Names 1, parameter names 1, one value of two: 3 of 1 + 1 + 2.
    assert tool_calls(said % 5, wanted) == pytest.approx(1 + 6 * 3 / 4 - 3)
    assert tool_calls("no call", wanted) == pytest.approx(-3)
    assert tool_calls("<tool_call>{broken</tool_call>", wanted) == -3
    with pytest.raises(ValueError, match="JSON list"):
        tool_calls("", "4")


def test_a_vote_weighs_policies_by_how_consistent_they_are() -> None:
    assert answer_of(r"so \boxed{ 7 }, not 8") == "7" and answer_of("1 then 42") == "42" and answer_of(" yes ") == "yes"
    own = Batch({"response": Column.strings(["1", "2", "3", "3"]), "group_id": numbers(*[0] * 4, dtype="int64")})
    theirs = Batch({"response": Column.strings(["1", "1", "1", "2"]), "group_id": numbers(*[0] * 4, dtype="int64")})
    # Weights 1/2 and 3/4. 1: 1/8 + 9/16, 2: 1/8 + 3/16, 3: 1/4.
    assert values(agrees_with_vote(own, theirs).columns, "rewards") == [1, 0, 0, 0]
    assert values(agrees_with_vote(theirs, own).columns, "rewards") == [1, 1, 1, 0]


def test_accuracies_on_pairs_and_lists() -> None:
    pairs = Batch(
        {
            "label": numbers(1, -1, 1, -1, dtype="int8"),
            "group_id": numbers(0, 0, 1, 1, dtype="int64"),
            "rewards": numbers(2, 1, 0, 0),
            "old_log_probs": ragged([-1, -1], [-1], [-1], [-3]),
            "ref_log_probs": ragged([-2, -2], [-1], [-1], [-4]),
        }
    )
    found = accuracies(pairs, names=("rewards", "old_log_probs", "ref_log_probs")).metrics
    # Explicit: 2 > 1, a tie. Policy: -2 < -1, -1 > -3. Reference: -4 < -1, -1 > -4. Ratios: 2 > 0, 0 < 1.
    assert {name: metric.value for name, metric in found.items()} == {
        "explicit_accuracy": 0.5,
        "ranking_accuracy": 0.5,
        "reference_ranking_accuracy": 0.5,
        "implicit_accuracy": 0.5,
    }
    lists = Batch(
        {
            "scored": numbers(3, 1, 2, 5, 4, 0),
            "rewards": numbers(1, 0, 0, 1, 1, 0),
            "group_id": numbers(0, 0, 0, 1, 1, 1, dtype="int64"),
        }
    )
    found = found_right(lists, right=0.5).metrics
    assert found["best_accuracy"].value == 1 and found["ties_accuracy"].value == 1  # a gap of 4, right ones 1 apart


def test_distinct_n_grams() -> None:
    # Words: 2 of 4; pairs: 1 of 2. Longer ones there are none.
    assert distinct(["a b", "a b"]) == pytest.approx(0.5) and distinct([""]) == 0.0
    assert distinct(["a b", "c d"]) == 1.0
