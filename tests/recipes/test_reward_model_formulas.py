"""Reward models that mix, contrast, rewrite, label themselves or steps, against values worked by hand."""

from __future__ import annotations

from math import exp, log
from typing import Any

import numpy as np
import pytest
import torch

from recipes.policy_gradient.dense_rewards import kept_as_it_is
from recipes.reward_models.charm import adaptive_margin, own_labels
from recipes.reward_models.consistency import (
    fusion,
    last_directions,
    mixed_preference,
    shares_of_similar,
    with_partners,
)
from recipes.reward_models.goal_conditioned import contrastive_preference, drawn_states
from recipes.reward_models.seq2seq_reward import better_after_worse
from recipes.reward_models.step_consensus import (
    agreed,
    beginnings,
    completed_text,
    first_wrong,
    is_right,
    process_bench,
)
from rlhf_dist.algorithms import bradley_terry
from rlhf_dist.algorithms.contract import ModelOutput
from rlhf_dist.batch import Batch, Column
from rlhf_dist.missing import MISSING, is_missing
from tests.recipes.rows import masked, micro_batch, numbers, ragged, values


def log_sigmoid(x: float) -> float:
    return -log(1 + exp(-x))


def of_scores(loss: Any, scores: list[float], columns: dict[str, Any], groups: list[int], **more: Any) -> list[float]:
    """The loss of rows of one token each."""
    said = ModelOutput(scores=torch.tensor(scores, dtype=torch.float64), **more)
    found: list[float] = loss(said, micro_batch(columns, [1] * len(scores), groups))[0].tolist()
    return found


def test_a_goal_is_ahead_in_the_same_response_and_away_from_the_other() -> None:
    # States of the chosen row (1, 0), (0, 1): cosine 0 to its goal; of the rejected one (1, 0): cosine 1.
    hidden = torch.tensor([[2.0, 0], [0, 3.0], [1.0, 0]], dtype=torch.float64)
    columns = {"label": [1, -1], "source": [1, 0, 0], "goal": [0, 1, 1]}
    said = ModelOutput(scores=torch.tensor([2.0, 0.5], dtype=torch.float64), hidden=hidden)
    rows = micro_batch(columns, [2, 1], [0, 0])
    value, _ = contrastive_preference(0.5, 0.25)(said, rows)
    assert value.tolist() == pytest.approx([-log_sigmoid(1.5) - 0.5 * log_sigmoid((0 - 1) / 0.25)])
    plain, _ = contrastive_preference(0.0)(said, rows)
    assert plain.tolist() == pytest.approx([-log_sigmoid(1.5)])  # without the term it is Bradley-Terry


def test_source_and_goal_are_drawn_in_order() -> None:
    batch = Batch({"response_mask": masked(4, 3, 0), "label": numbers(1, -1, 1, dtype="int8")})
    for seed in range(20):
        made = drawn_states(batch, rng=np.random.default_rng(seed))
        source, goal = values(made, "source"), values(made, "goal")
        assert sum(source[:4]) == sum(goal[:4]) == sum(goal[4:]) == 1 and sum(source[4:]) == 0
        assert source.index(1) < goal.index(1)
    one = Batch({"response_mask": masked(1, 3), "label": numbers(1, -1, dtype="int8")})
    made = drawn_states(one, rng=np.random.default_rng(0))
    assert sum(values(made, "source")) == 0 and values(made, "goal")[0] == 0, "one token has none behind it"


def test_the_rewriter_reads_the_prompt_and_the_worse_response() -> None:
    batch = Batch(
        {
            "prompt_ids": ragged([1], [1], [2], [2], dtype="int32"),
            "response_ids": ragged([5, 6], [7], [8], [9, 9], dtype="int32"),
            "label": numbers(-1, 1, 1, -1, dtype="int8"),
            "group_id": numbers(0, 0, 1, 1, dtype="int64"),
        }
    )
    result = better_after_worse(batch)
    assert result.keep is not None and result.keep.tolist() == [1, 2]
    assert [row.tolist() for row in result.columns["prompt_ids"].rows()] == [[1, 5, 6], [2, 9, 9]]
    said = Batch(
        {
            "rewritten_log_probs": ragged([-1, -2], [-4]),
            "rewards": numbers(2, 3),
            "response_mask": ragged([1, 0], [1], dtype="uint8"),
        }
    )
    kept = kept_as_it_is(said, coef=0.5, reward_coef=0.0)
    assert values(kept, "token_rewards") == [-0.5, 0, -2] and values(kept, "rewards") == [0, 0]


def test_a_mixed_pair_is_the_mixture_of_two_pairs_scores() -> None:
    # lambda 3/4: 3/4 (2 - 1) + 1/4 (0 - 4) = -1/4.
    columns = {"label": [1, -1, 1, -1], "share": [0.75, 0.75, 0.25, 0.25]}
    assert of_scores(mixed_preference(), [2.0, 1, 0, 4], columns, [0] * 4) == pytest.approx([-log_sigmoid(-0.25)])
    alone = {"label": [1, -1], "share": [1.0, 1.0]}
    assert of_scores(mixed_preference(), [2.0, 1], alone, [0, 0]) == pytest.approx(
        of_scores(bradley_terry(), [2.0, 1], alone, [0, 0])
    )


def test_each_pair_has_the_next_one_as_its_partner() -> None:
    batch = Batch({"label": numbers(1, -1, 1, -1, dtype="int8"), "group_id": numbers(3, 3, 4, 4, dtype="int64")})
    made = with_partners(batch, least_share=0.5, rng=np.random.default_rng(0))
    assert made.parent is not None and made.parent.tolist() == [0, 1, 2, 3, 2, 3, 0, 1]
    share = np.array(values(made.columns, "share"))
    assert values(made.columns, "group_id") == [3, 3, 3, 3, 4, 4, 4, 4] and (share[0] >= 0.5) and (share[4] >= 0.5)
    np.testing.assert_allclose(share[[0, 4]] + share[[2, 6]], 1, rtol=1e-6)
    plain = with_partners(batch, least_share=1.0, rng=np.random.default_rng(0))
    assert plain.parent is not None and plain.parent.tolist() == [0, 1, 2, 3]


def test_rewards_are_fused_over_rows_that_are_alike() -> None:
    # Directions (1, 0), (1, 0), (0, 1): the first two share evenly, the third is alone.
    states = np.array([[1.0, 0], [1, 0], [0, 1]])
    np.testing.assert_allclose(shares_of_similar(states, 0.9, 0.1), [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    batch = Batch(
        {
            "hidden": Column(
                np.array([[9.0, 9], [2, 0], [3, 0], [0, 1], [0, 2]], np.float32), np.array([0, 2, 3, 4, 5])
            ),
            "rewards": numbers(3, 0, 2, 0),
            "label": numbers(1, -1, 1, -1, dtype="int8"),
            "group_id": numbers(0, 0, 1, 1, dtype="int64"),
        }
    )
    np.testing.assert_allclose(last_directions(batch), [[1, 0], [1, 0], [0, 1], [0, 1]])
    # Fused: 1.5, 1.5, 1, 1: every pair is a tie, which counts as wrong.
    metrics = fusion(batch, least_cosine=0.9, tau=0.1).metrics
    assert (metrics["plain_accuracy"].value, metrics["fused_accuracy"].value) == (1.0, 0.0)
    apart = fusion(batch, least_cosine=1.1, tau=0.1).metrics
    assert apart["fused_accuracy"].value == apart["plain_accuracy"].value  # nothing is alike: nothing is fused


def test_margins_of_an_act_and_labels_of_ones_own() -> None:
    columns = {"label": [1, -1], "margin": [2.0, 2.0]}
    assert of_scores(adaptive_margin(0.5), [3.0, 1], columns, [0, 0]) == pytest.approx([-log_sigmoid(2 - 0.5 * 2)])
    assert of_scores(adaptive_margin(0.0), [3.0, 1], columns, [0, 0]) == pytest.approx(
        of_scores(bradley_terry(), [3.0, 1], columns, [0, 0])
    )
    batch = Batch({"rewards": numbers(0, 2, 1, 0.5, 3, 3), "group_id": numbers(0, 0, 1, 1, 2, 2, dtype="int64")})
    result = own_labels(batch, sure=1.0)
    assert result.keep is not None and result.keep.tolist() == [0, 1] and values(result.columns, "label") == [-1, 1]
    assert own_labels(batch, sure=0.0).keep.tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]  # a tie is no label


def test_a_solution_is_cut_at_the_ends_of_its_steps() -> None:
    batch = Batch(
        {
            "response_ids": ragged([1, 2, 3, 4, 5], [], [6, 7], dtype="int32"),
            "response_mask": masked(5, 0, 2),
            "response": Column.strings(["abcdef", "", "gh"]),
            "text_ends": ragged([1, 2, 4, 5, 6], [], [1, 2], dtype="int32"),  # the third token is two characters
            "finished": numbers(1, 1, 0, dtype="uint8"),
            "row_id": numbers(10, 11, 12, dtype="int64"),
        }
    )
    made = beginnings(batch, step_tokens=2)
    assert made.parent is not None and made.parent.tolist() == [0, 0, 0, 2]
    assert [row.tolist() for row in made.columns["response_ids"].rows()] == [
        [1, 2],
        [1, 2, 3, 4],
        [1, 2, 3, 4, 5],
        [6, 7],
    ]
    assert made.columns["so_far"].rows() == ["ab", "abcde", "abcdef", "gh"]
    assert values(made.columns, "ended") == [0, 0, 1, 0], "the last solution was cut"
    completions = Batch({**made.columns, "response": Column.strings(["X", "Y", "Z", "W"])}, 4)
    assert completed_text(completions)["response"].rows() == ["abX", "abcdeY", "abcdef", "ghW"]
    assert values(made.columns, "solution") == [10, 10, 10, 12] and values(made.columns, "step") == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="at most 64 steps, got 65 of 1 tokens; set algorithm.step_tokens to 2"):
        beginnings(
            Batch(
                {
                    "response_ids": ragged([1] * 65, dtype="int32"),
                    "response_mask": masked(65),
                    **{"response": Column.strings([""]), "finished": numbers(0), "text_ends": ragged([0] * 65)},
                    "row_id": numbers(1, dtype="int64"),
                }
            ),
            step_tokens=1,
        )


def test_steps_are_kept_where_both_labellers_find_the_same_first_error() -> None:
    # Solution 1: both say the second step. 2: completions say the first, the judge none. 3: both none. 4: no verdict.
    batch = Batch(
        {
            "completed": numbers(0.5, 0, 0.25, 0, 0.5, 1, 1),
            "judged_right": numbers(1, 0, 1, 1, 1, 1, MISSING),
            "solution": numbers(1, 1, 1, 2, 3, 3, 4, dtype="int64"),
            "step": numbers(0, 1, 2, 0, 0, 1, 0, dtype="int64"),
            "group_id": numbers(0, 0, 0, 0, 0, 0, 0, dtype="int64"),
        }
    )
    result = agreed(batch, right=0.5)
    assert result.keep is not None and result.keep.tolist() == [0, 1, 4, 5]
    assert values(result.columns, "desirable") == [1, 0, 1, 1]
    assert result.metrics["agreement"].value == 0.5 and result.metrics["solutions_without_labels"].value == 1
    assert [first_wrong(np.array(one)) for one in ([True, False, True], [True, True], [False])] == [1, 2, 0]
    right = is_right(Batch({"rewards": numbers(0.4, 0.6, MISSING)}), right=0.5)["rewards"].values
    assert right[:2].tolist() == [0, 1] and is_missing(right)[2]


def test_process_bench_is_the_harmonic_mean_of_errors_found_and_none_invented() -> None:
    # Solutions 1 and 2 have an error, which is found in one; 3 and 4 have none, and none is said. F1: 2 (1/2) / (3/2).
    batch = Batch(
        {
            "desirable": numbers(1, 0, 0, 1, 1),
            "scored": numbers(2, -1, 1, 1, 3),
            "solution": numbers(1, 1, 2, 3, 4, dtype="int64"),
            "step": numbers(0, 1, 0, 0, 0, dtype="int64"),
            "group_id": numbers(0, 0, 0, 0, 0, dtype="int64"),
        }
    )
    metrics = process_bench(batch).metrics
    assert (metrics["wrong_accuracy"].value, metrics["right_accuracy"].value) == (0.5, 1.0)
    assert metrics["f1"].value == pytest.approx(2 / 3)
    assert "f1" not in process_bench(batch.slice(3, 5)).metrics  # without a wrong one there is nothing to find
