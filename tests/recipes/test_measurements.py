"""Measurements of samples, judges and taught models, against values worked by hand."""

from __future__ import annotations

import pytest

from recipes.evaluation.deception import conflicts
from recipes.evaluation.win_rate import measured
from rlhf_dist.batch import Batch, Column
from rlhf_dist.missing import MISSING
from rlhf_dist.transforms.tries import best_of_k, pass_at_k, tries
from tests.recipes.rows import masked, numbers


def test_deception_is_where_the_teacher_cannot_see() -> None:
    # Gaps of weak, taught, ceiling: (1, -1, 1), (-1, -1, 1), (1, 1, 1), (1, -1, -1): two conflicts, one unseen.
    gaps = {"weak": [1, -1, 1, 1], "taught": [-1, -1, 1, -1], "ceiling": [1, 1, 1, -1]}
    batch = Batch(
        {
            **{name: numbers(*(part for gap in of for part in (gap, 0))) for name, of in gaps.items()},
            "label": numbers(*([1, -1] * 4), dtype="int8"),
            "group_id": numbers(0, 0, 1, 1, 2, 2, 3, 3, dtype="int64"),
        }
    )
    metrics = conflicts(batch, sure=0.0).metrics
    assert (metrics["conflict"].value, metrics["deception"].value, metrics["taught_accuracy"].value) == (0.5, 0.5, 0.25)
    assert conflicts(batch, sure=1.0).metrics["deception"].value == 1.0  # the weak model is sure of nothing


def test_tries_at_a_prompt() -> None:
    # 4 tries, 1 right: pass@2 = 1 - C(3, 2) / C(4, 2) = 1/2. Highest of 2 of 0, 0, 1, 2: (0 + 1 + 1 + 2 + 2 + 2) / 6.
    assert pass_at_k(4, 1, 2) == 0.5 and pass_at_k(4, 0, 4) == 0 and pass_at_k(4, 4, 1) == 1
    assert best_of_k([0, 1, 0, 2], 2) == pytest.approx(8 / 6) and best_of_k([3, 1], 1) == 2
    batch = Batch(
        {
            "rewards": numbers(0, 1, 0, 0, 1, MISSING),
            "group_id": numbers(0, 0, 0, 0, 1, 1, dtype="int64"),
            "source": Column.strings(["math"] * 4 + [""] * 2),
        }
    )
    metrics = tries(batch, right=0.5).metrics
    assert metrics["math/pass_at_2"].value == 0.5 and metrics["math/reward"].value == 0.25
    assert metrics["pass_at_1"].value == pytest.approx((0.25 + 1) / 2)
    assert metrics["pass_at_2"].value == metrics["best_of_2"].value == 0.5 and metrics["pass_at_4"].value == 1
    assert metrics["missing_rewards"].value == 1 and "/reward" not in metrics, "its source has no name"


def test_a_win_rate_is_of_the_measured_policy_alone() -> None:
    batch = Batch(
        {
            "rewards": numbers(1, 0.5, MISSING, 0, 0.5, MISSING),
            "ours": numbers(1, 1, 1, 0, 0, 0),
            "response_mask": masked(2, 4, 6, 1, 1, 1),
        }
    )
    metrics = measured(batch).metrics
    assert metrics["win_rate"].value == 0.75 and metrics["unjudged"].value == pytest.approx(1 / 3)
    assert (metrics["our_tokens"].value, metrics["their_tokens"].value) == (4, 1)
