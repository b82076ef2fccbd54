"""Recipes that choose where a reward comes from, how often a prompt is answered, and what is improved, by hand."""

from __future__ import annotations

from collections import Counter
from math import exp, log

import numpy as np
import pytest
import torch

from recipes.constrained.sparrow import judged, under_rule
from recipes.policy_gradient.anchored_judge import chance_to_win
from recipes.policy_gradient.esrl import as_needed
from recipes.policy_gradient.improvement import Curriculum, Improvement, gap_loss
from recipes.reasoning.oorl import group_preference
from recipes.reasoning.reward_router import Phase, RewardRouter, lowest_groups, routes
from recipes.reasoning.vulpo import VULPO, Labels, scaled_sum
from recipes.reward_models.annotators import drawn_from, with_noise
from rlhf_dist.algorithms import dpo
from rlhf_dist.algorithms.contract import ModelOutput
from rlhf_dist.batch import Batch, Column
from tests.recipes.rows import masked, micro_batch, numbers, of_rows, values


def log_sigmoid(x: float) -> float:
    return -log(1 + exp(-x))


def groups(*ids: int) -> Column:
    return numbers(*ids, dtype="int64")


def test_a_chance_to_win_is_a_mean_of_both_orders() -> None:
    # A judge that always says "the first" leaves 1/2; one that says the same both ways is believed.
    made = chance_to_win(Batch({"first": numbers(1, 1, 0.5), "second": numbers(1, 0, 0)}))
    assert values(made.columns, "rewards") == [0.5, 1, 0.75]
    assert made.metrics["order_agreement"].value == pytest.approx(1 / 3)


def test_a_reward_of_parts_counts_for_more_where_it_is_hard() -> None:
    state, right = Labels(), {"right": 0.5}
    batch = Batch({"answer": Column.strings(["a", "a", "b", "b"]), "rewards": numbers(1, 0, 0, 0)})
    kept, made = state.scale(state.initial(VULPO()), batch, **right)
    assert values(made.columns, "label_scale") == [1.5, 1.5, 2, 2]
    _, made = state.scale(kept, batch.slice(0, 1), **right)
    assert values(made.columns, "label_scale") == pytest.approx([2 - 2 / 3])
    # Group 0 is right in 1 of 2: 1.5; group 1 in none: 2. (1 + 0.5 * 1 + 0.5 * 4 / 10) * 1.5 * 1.5 = 1.7 * 2.25, ...
    columns = {"located": numbers(1, 0, 0, 1), "relevant": numbers(4, 10, 0, 0)}
    columns |= {"label_scale": numbers(1.5, 1.5, 2, 2), "group_id": groups(0, 0, 1, 1), "rewards": batch["rewards"]}
    made = scaled_sum(Batch(columns), located_weight=0.5, relevant_weight=0.5, right=0.5)
    np.testing.assert_allclose(values(made.columns, "rewards"), [1.7 * 2.25, 0.5 * 2.25, 0, 2], rtol=1e-6)


def test_equivalent_programs_are_above_the_others_and_level() -> None:
    # h: 1, 0, -1, beta 0.5: s = 0.5, 0 of equivalent ones, -0.5 of the other. Spread: mean of 1/16 twice.
    columns = {"rewards": [1, 1, 0], "ref_log_probs": [-2.0, -2.0, -1.0]}
    expected = (-log_sigmoid(1.0) - log_sigmoid(0.5)) / 2 + 2 * 0.0625
    loss = group_preference(0.5, level_coef=2.0)
    assert of_rows(loss, [-1.0, -2.0, -2.0], columns, [1] * 3, [0] * 3) == pytest.approx([expected])
    pair = {**columns, "label": [1, 1, -1]}
    two = ([-1.0, -2.0], {name: one[::2] for name, one in pair.items()}, [1, 1], [0, 0])
    assert of_rows(loss, *two) == pytest.approx(of_rows(dpo(0.5), *two))
    alone = ([-1.0, -2.0], {name: one[:2] for name, one in columns.items()}, [1, 1], [0, 0])
    assert of_rows(loss, *alone) == pytest.approx([2 * 0.0625])


def test_a_route_is_one_of_three_and_the_checkable_come_first() -> None:
    batch = Batch({"route": Column.strings(["verify", "compare", "truth"])})
    found = routes(batch).columns
    assert values(found, "verify") == [1, 0, 0] and values(found, "truth") == [0, 0, 1]
    with pytest.raises(ValueError, match="one of verify, truth, compare, got 'rule' in row 0"):
        routes(Batch({"route": Column.strings(["rule"])}))
    state = Phase()
    kept, first = state.checkable_first(state.initial(RewardRouter()), batch, first_steps=1)
    _, later = state.checkable_first(kept, batch, first_steps=1)
    assert first.keep is not None and first.keep.tolist() == [0] and first.metrics["waiting"].value == 2
    assert later.keep is not None and later.keep.tolist() == [0, 1, 2]


def test_the_prompts_with_the_lowest_rewards_are_kept() -> None:
    batch = Batch({"rewards": numbers(1, 1, 0, 1, 0, 0), "group_id": groups(0, 0, 1, 1, 2, 2)})
    made = lowest_groups(batch, share=2 / 3)
    assert made.keep is not None and made.keep.tolist() == [2, 3, 4, 5]
    assert made.metrics["reward_of_all"].value == 0.5 and made.metrics["reward_of_kept"].value == 0.25
    assert lowest_groups(batch.slice(0, 0), share=0.5).columns.num_rows == 0


def test_a_prompt_is_answered_as_often_as_it_needs() -> None:
    # c: 1/4, 1, unknown: round(6 * 3/4) = 4 (to even), none, none; below 1/2 is hot.
    prompts = Batch({"group_id": groups(4, 5, 6, 7)})
    rewards = numbers(0.5, 0, 1, 1, np.nan, np.nan, 0.5, np.nan)
    probes = Batch({"rewards": rewards, "group_id": groups(4, 4, 5, 5, 6, 6, 7, 7)})
    made = as_needed(prompts, probes, most=6, able=0.5)
    assert made.parent is not None and made.parent.tolist() == [0] * 4 + [3] * 3
    assert values(made.columns, "hot") == [1] * 4 + [0] * 3
    assert made.metrics["capability"].value == pytest.approx(1.75 / 3)
    with pytest.raises(ValueError, match="at most 16 .* most=17"):
        as_needed(prompts, probes, most=17, able=0.5)


def test_broken_rules_and_length_are_taken_off() -> None:
    # Log-odds log 3 and 0: 3/4 and 1/2 broken. 2 - 2 * (3/4 + 1/2) - 0.1 * 3.
    batch = Batch(
        {"rewards": numbers(2), "broken_0": numbers(log(3)), "broken_1": numbers(0), "response_mask": masked(3)}
    )
    made = judged(batch, rules=2, weight=2.0, price=0.1)
    assert values(made.columns, "rewards") == pytest.approx([-0.8])
    assert made.metrics["rule_0_broken"].value == pytest.approx(0.75)
    plain = judged(batch, rules=2, weight=0.0, price=0.0)
    assert values(plain.columns, "rewards") == [2]  # the preference alone
    prompts = Batch({"prompt_ids": Column.ragged([np.array([1]), np.array([2])], dtype="int32")})
    assert under_rule(prompts, rule="no").num_rows == 2


def test_annotators_are_drawn_for_a_pair_and_turn_some_labels() -> None:
    batch = Batch({"group_id": groups(0, 0, 1, 1), "label": numbers(1, -1, -1, 1, dtype="int8")})
    said = [
        drawn_from(batch, pool=("a", "b"), rng=np.random.default_rng(seed))["annotator"].rows() for seed in range(40)
    ]
    assert Counter(map(tuple, said)).keys() == {tuple(f"{x}{x}{y}{y}") for x in "ab" for y in "ab"}
    turned = with_noise(batch, noise=1.0, rng=np.random.default_rng(0))
    assert values(turned.columns, "label") == [-1, 1, 1, -1] and turned.metrics["turned"].value == 1
    assert values(with_noise(batch, noise=0.0, rng=np.random.default_rng(0)).columns, "label") == [1, -1, -1, 1]


def test_gaps_are_in_order() -> None:
    # Rows (w | w), (l | w), (w | l), (l | l) with gaps 0, -2, 3, 1: best - 0, best - 1, 0 + 2, 1 + 2.
    columns = {"label": [1, -1, 1, -1], "shown_label": [1, 1, -1, -1]}
    model = ModelOutput(scores=torch.tensor([0.0, -2.0, 3.0, 1.0], dtype=torch.float64))
    value, metrics = gap_loss()(model, micro_batch(columns, [1] * 4, [0] * 4))
    assert value.tolist() == pytest.approx([-sum(map(log_sigmoid, (3, 2, 2, 3)))])
    assert metrics["accuracy"].tolist() == [1] and metrics["margin"].tolist() == [5]


def test_rejected_responses_are_improved_before_chosen_ones() -> None:
    state, batch = Curriculum(), Batch({"label": numbers(1, -1, dtype="int8")})
    kept, first = state.to_improve(state.initial(Improvement()), batch, harder_after=1)
    _, later = state.to_improve(kept, batch, harder_after=1)
    assert first.keep is not None and first.keep.tolist() == [1]
    assert later.keep is not None and later.keep.tolist() == [0]
