"""Losses on given preferences against values worked by hand from the papers, and the limits that join them."""

from __future__ import annotations

from math import exp, expm1, log

import numpy as np
import pytest
import torch

from recipes.preference._lists import list_loss
from recipes.preference._pairs import with_reference, without_reference
from recipes.preference.alol import leftover, weighted_imitation
from recipes.preference.dpo import chosen_nll
from recipes.preference.dro import bracket, dro_policy, prompt_value
from recipes.preference.kto import kto_loss, reward_shift
from recipes.preference.rankings import lists_of_prompts
from rlhf_dist.algorithms import dpo, simpo
from rlhf_dist.algorithms.contract import ModelOutput
from rlhf_dist.batch import Batch, Column
from tests.recipes.rows import gradient, masked, micro_batch, numbers, of_rows, ragged, values


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def log_sigmoid(x: float) -> float:
    return -log(1 + exp(-x))


# A pair: chosen of 2 tokens, log pi = -1 - 2 = -3, log pi_ref = -4; rejected of 1 token, log pi -2, log pi_ref -1.5.
# h(w) = 1, h(l) = -0.5, D = 1.5; beta = 0.5: beta D = 0.75.
LOG_PROBS = [-1.0, -2.0, -2.0]
PAIR = {"label": [1, -1], "ref_log_probs": [-2.0, -2.0, -1.5]}
SHAPE = ([2, 1], [0, 0])
EXO = sigmoid(0.75) * (log_sigmoid(0.75) - log(0.9)) + sigmoid(-0.75) * (log_sigmoid(-0.75) - log(0.1))
DISCO = sigmoid(0.75 / 0.5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("hinge", 1 - 0.75),
        ("exo", EXO),
        ("sppo", (1 - 1) ** 2 + (-0.5 + 1) ** 2),  # 1 / (2 beta) = 1
        ("nca", -log_sigmoid(0.5) - (log_sigmoid(-0.5) + log_sigmoid(0.25)) / 2),
        ("apo_zero", 1 - sigmoid(0.5) + sigmoid(-0.25)),
        ("apo_down", sigmoid(0.5) + 1 - sigmoid(0.75)),
        ("dpop", -log_sigmoid(0.75)),  # h(w) > 0: no penalty
        ("cal_dpo", -log_sigmoid(1.5) + 0 + 0.25),
        ("discopop", -(1 - DISCO) * log_sigmoid(0.75) + DISCO * exp(-0.75)),
    ],
)
def test_a_loss_with_a_reference(kind: str, expected: float) -> None:
    loss = with_reference(kind, 0.5, smoothing=0.1, temperature=0.5)  # type: ignore[arg-type]
    assert of_rows(loss, LOG_PROBS, PAIR, *SHAPE) == pytest.approx([expected])


def test_dpop_charges_a_chosen_response_that_lost_probability() -> None:
    # h(w) = -1, h(l) = -0.5: D = -0.5. beta (D - lambda 1) = 0.5 (-0.5 - 2) = -1.25 with lambda 2; DPO with lambda 0.
    pair = {"label": [1, -1], "ref_log_probs": [-1.0, -1.0, -1.5]}
    assert of_rows(with_reference("dpop", 0.5, penalty=2.0), LOG_PROBS, pair, *SHAPE) == pytest.approx(
        [-log_sigmoid(-1.25)]
    )
    assert of_rows(with_reference("dpop", 0.5, penalty=0.0), LOG_PROBS, pair, *SHAPE) == pytest.approx(
        of_rows(dpo(0.5), LOG_PROBS, pair, *SHAPE)
    )


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        # log pi(w) = -3, log pi(l) = -2; beta (w - l) = -0.5; - lambda log pi(w) = 0.3 with lambda 0.1.
        ("cpo", {"nll_coef": 0.1}, -log_sigmoid(-0.5) + 0.3),
        # Means -1.5 and -2: log odds = m - log(1 - e^m).
        (
            "orpo",
            {"nll_coef": 0.1},
            1.5 - 0.1 * log_sigmoid((-1.5 - log(1 - exp(-1.5))) - (-2 - log(1 - exp(-2)))),
        ),
        ("slic", {"nll_coef": 0.1, "gap": 1.0}, (1 + 3 - 2) + 0.3),
        # Discount 0.5: w: -1 + 0.5 * -2 = -2, l: -2; beta (-2 - 0.25 * -2) = -0.75.
        ("cpl", {"bias": 0.25, "discount": 0.5}, -log_sigmoid(-0.75)),
        # (1 - p^-a) / a with a = 0.5 and p = e^-1.5, e^-2; beta times the difference, less gamma.
        ("alphapo", {"alpha": 0.5, "gap": 0.2}, -log_sigmoid(0.5 * (-expm1(0.75) + expm1(1.0)) / 0.5 - 0.2)),
    ],
)
def test_a_loss_without_a_reference(kind: str, settings: dict[str, float], expected: float) -> None:
    loss = without_reference(kind, 0.5, **settings)  # type: ignore[arg-type]
    assert of_rows(loss, LOG_PROBS, {"label": [1, -1]}, *SHAPE) == pytest.approx([expected])


def test_alphapo_tends_to_simpo_and_cpl_without_bias_is_a_likelihood_ratio() -> None:
    label = {"label": [1, -1]}
    near = of_rows(without_reference("alphapo", 2.0, alpha=1e-7, gap=0.5), LOG_PROBS, label, *SHAPE)
    assert near == pytest.approx(of_rows(simpo(2.0, 0.5), LOG_PROBS, label, *SHAPE), rel=1e-5)
    plain = of_rows(without_reference("cpl", 0.5, bias=1.0), LOG_PROBS, label, *SHAPE)
    assert plain == pytest.approx([-log_sigmoid(0.5 * (-3 + 2))])


def test_a_shift_of_both_responses_leaves_losses_of_the_difference_alone() -> None:
    shifted = {**PAIR, "ref_log_probs": [-2.0, -1.0, -0.5]}  # one nat more for both
    for kind in ("hinge", "exo", "discopop"):
        loss = with_reference(kind, 0.5)  # type: ignore[arg-type]
        assert of_rows(loss, LOG_PROBS, shifted, *SHAPE) == pytest.approx(of_rows(loss, LOG_PROBS, PAIR, *SHAPE))


def test_the_chosen_responses_likelihood() -> None:
    assert of_rows(chosen_nll(), LOG_PROBS, {"label": [1, -1]}, *SHAPE) == [3.0]


# A list of three responses of a token each: log pi -1, -3, -2; rewards 2, 0, 1. log pi_ref -2 for all: h = 1, -1, 0.
LIST = {"rewards": [2, 0, 1], "ref_log_probs": [-2.0, -2.0, -2.0], "old_log_probs": [-1.0, -2.0, -2.0]}
LIST_LOG_PROBS = [-1.0, -3.0, -2.0]
LIST_SHAPE = ([1, 1, 1], [0, 0, 0])


def softmax(*scores: float) -> list[float]:
    return [exp(one) / sum(map(exp, scores)) for one in scores]


def test_lists_by_plackett_luce() -> None:
    # Order 1st, 3rd, 2nd: log-sum-exp(-1, -2, -3) + 1, then log-sum-exp(-2, -3) + 2; the last is alone.
    ranks = -log(softmax(-1, -2, -3)[0]) - log(softmax(-2, -3)[0])
    pro = list_loss("pro", nll_coef=0.5)
    assert of_rows(pro, LIST_LOG_PROBS, LIST, *LIST_SHAPE) == pytest.approx([ranks + 0.5])
    scaled = -log(softmax(0.5, 0, -0.5)[0]) - log(softmax(0, -0.5)[0])
    assert of_rows(list_loss("plackett_luce", 0.5), LIST_LOG_PROBS, LIST, *LIST_SHAPE) == pytest.approx([scaled])


def test_two_responses_under_plackett_luce_are_dpo() -> None:
    two = {**PAIR, "rewards": [1, 0]}
    assert of_rows(list_loss("plackett_luce", 0.5), LOG_PROBS, two, *SHAPE) == pytest.approx(
        of_rows(dpo(0.5), LOG_PROBS, PAIR, *SHAPE)
    )


def test_rrhf_charges_pairs_in_the_wrong_order() -> None:
    # With rewards 0, 2, 1: pairs (2nd > 1st): -1 + 3 = 2; (2nd > 3rd): -2 + 3 = 1; (3rd > 1st): -1 + 2 = 1; best: 3.
    lists = {**LIST, "rewards": [0, 2, 1]}
    assert of_rows(list_loss("rrhf"), LIST_LOG_PROBS, lists, *LIST_SHAPE) == pytest.approx([2 + 1 + 1 + 3])
    assert of_rows(list_loss("rrhf"), LIST_LOG_PROBS, LIST, *LIST_SHAPE) == pytest.approx([1])


def test_lipo_weighs_pairs_by_gain_and_place() -> None:
    # s = 0.5, -0.5, 0: places 1, 3, 2; gains 4, 1, 2; discounts 1 / log 2, 1 / log 4, 1 / log 3.
    d = [1 / log(2), 1 / log(4), 1 / log(3)]
    expected = sum(
        abs(gain) * abs(d[i] - d[j]) * log(1 + exp(-gap))
        for i, j, gain, gap in ((0, 1, 3, 1.0), (0, 2, 2, 0.5), (2, 1, 1, 0.5))
    )
    assert of_rows(list_loss("lipo", 0.5), LIST_LOG_PROBS, LIST, *LIST_SHAPE) == pytest.approx([expected])


def test_exo_of_a_list_is_a_reverse_kl_and_zero_at_the_posterior() -> None:
    said, wanted = softmax(0.5, -0.5, 0), softmax(4, 0, 2)
    expected = sum(p * log(p / q) for p, q in zip(said, wanted, strict=True))
    loss = list_loss("exo", 0.5, temperature=0.5)
    assert of_rows(loss, LIST_LOG_PROBS, LIST, *LIST_SHAPE) == pytest.approx([expected])
    # h = 2 r: beta h = r: the two are the same distribution.
    at = {**LIST, "ref_log_probs": [-5.0, -3.0, -4.0]}
    assert of_rows(list_loss("exo", 0.5), LIST_LOG_PROBS, at, *LIST_SHAPE) == pytest.approx([0.0], abs=1e-9)


def test_brain_draws_towards_the_posterior_and_rests_there() -> None:
    # a = softmax(log ref - log old + r): (-1 + 2, 0, 0 + 1); b = softmax(log pi - log old): (0, -1, 0).
    a, b = softmax(1, 0, 1), softmax(0, -1, 0)
    found = gradient(list_loss("brain"), LIST_LOG_PROBS, LIST, *LIST_SHAPE)
    assert found == pytest.approx([q - p for p, q in zip(a, b, strict=True)])
    posterior = {**LIST, "ref_log_probs": [-3.0, -3.0, -3.0]}  # log ref + r = log pi up to a constant
    assert gradient(list_loss("brain"), LIST_LOG_PROBS, posterior, *LIST_SHAPE) == pytest.approx([0, 0, 0], abs=1e-9)


def test_rows_of_one_prompt_become_a_list() -> None:
    batch = Batch(
        {
            "prompt": Column.strings(["a", "b", "a"]),
            "score": numbers(1, 2, 3),
            "group_id": numbers(7, 8, 9, dtype="int64"),
        }
    )
    made = lists_of_prompts(batch)
    assert values(made, "group_id") == [7, 8, 7] and values(made, "rewards") == [1, 2, 3]


def test_bco_is_a_classifier_around_the_middle_of_both_kinds() -> None:
    columns = {
        "old_log_probs": ragged([-1, -1], [-2], [-4]),
        "ref_log_probs": ragged([-2, -2], [-2], [-3]),
        "response_mask": masked(2, 1, 1),
        "desirable": numbers(1, 1, 0),
    }
    # Log-ratios 2 and 0 of good rows, -1 of the bad one: (1 - 1) / 2 = 0. Good rows alone: 1.
    assert values(reward_shift(Batch(columns)).columns, "kl") == [0, 0, 0]
    assert values(reward_shift(Batch(columns).slice(0, 2)).columns, "kl") == [1, 1]
    rows = {"ref_log_probs": [-2.0, -3.0], "desirable": [1, 0], "kl": [0.5, 0.5]}
    # Good: r = 1, beta (r - z) = 0.25. Bad: r = -1, beta (z - r) = 0.75.
    found = of_rows(kto_loss(0.5, kind="bco"), [-1.0, -4.0], rows, [1, 1])
    assert found == pytest.approx([-log_sigmoid(0.25), -log_sigmoid(0.75)])


def test_dros_bracket_and_both_of_its_losses() -> None:
    batch = Batch(
        {
            "reward": numbers(2, 0),
            "values": ragged([0.5, 9], [-1]),
            "old_log_probs": ragged([-1, -2], [-1]),
            "ref_log_probs": ragged([-2, -2], [-3]),
            "response_mask": masked(2, 1),
        }
    )
    made = bracket(batch, tau=0.5)
    # r - V: 1.5 and 1; r - tau h with h = 1 and 2: 1.5 and -1.
    assert values(made, "surplus") == [1.5, 1.0] and values(made, "value_target") == [1.5, -1.0]
    columns = {"ref_log_probs": [-2.0, -2.0, -3.0], "surplus": [1.5, 1.0]}
    # (1.5 - 0.5)^2 / 2 and (1 - 1)^2 / 2; the gradient is -tau times the bracket at each token.
    assert of_rows(dro_policy(0.5), [-1.0, -2.0, -1.0], columns, [2, 1]) == pytest.approx([0.5, 0.0])
    assert gradient(dro_policy(0.5), [-1.0, -2.0, -1.0], columns, [2, 1]) == pytest.approx([-0.5, -0.5, 0.0])
    said = ModelOutput(values=torch.tensor([0.5, 9.0, -1.0], dtype=torch.float64))
    value, _ = prompt_value()(said, micro_batch({"value_target": [1.5, -1.0]}, [2, 1]))
    assert value.tolist() == [0.5, 0.0]


def test_alol_keeps_what_beats_the_value_and_cuts_its_ratio() -> None:
    batch = Batch({"reward": numbers(2, 0), "values": ragged([0.5, 9], [1]), "response_mask": masked(2, 1)})
    result = leftover(batch)
    assert result.keep is not None and result.keep.tolist() == [0] and values(result.columns, "advantage") == [1.5]
    # Ratios e^1, cut at 1.9, and e^-3, cut at 0.1; -A c log pi = -1.5 * 1.9 * -3 and -1 * 0.1 * -5.
    columns = {"ref_log_probs": [-2.0, -2.0, -2.0], "advantage": [1.5, 1.0]}
    found = of_rows(weighted_imitation(0.9), [-1.0, -2.0, -5.0], columns, [2, 1])
    assert found == pytest.approx([1.5 * 1.9 * 3, 0.1 * 5])
    assert np.isfinite(found).all()
