"""Recipes whose pairs and lists come of verdicts and of prompts, against values worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from recipes.online_preference.cyclealign import CycleAlign, Demonstrations, agreed, longest_rise
from recipes.online_preference.dueling import bounds, duellists, least_known
from recipes.online_preference.prompted_pairs import Curriculum, PromptedPairs
from recipes.online_preference.self_preferring import ranked_pairs
from rlhf_dist.batch import Batch, Column
from tests.recipes.rows import masked, numbers, ragged, values


def test_a_ranking_makes_pairs_from_both_of_its_ends() -> None:
    # Group 5: 1 > 3/4 > 1/4 > 0: (1, 0), p = 1; (3/4, 1/4), p = 3/4, of group -(4 * 5 + 1). Group 6: equal, no pair.
    batch = Batch(
        {
            "rewards": numbers(0.25, 1, 0, 0.75, 0.5, 0.5),
            "group_id": numbers(5, 5, 5, 5, 6, 6, dtype="int64"),
        }
    )
    made = ranked_pairs(batch, most=4)
    assert made.keep is not None and made.keep.tolist() == [0, 1, 2, 3]
    assert values(made.columns, "label") == [-1, 1, -1, 1]
    assert values(made.columns, "win") == [0.75, 1, 1, 0.75]
    assert values(made.columns, "group_id") == [-21, 5, 5, -21]
    assert made.metrics["strength"].value == 0.875
    assert "strength" not in ranked_pairs(batch.slice(4, 6), most=4).metrics


def test_negatives_become_harder_with_the_steps() -> None:
    state, batch = Curriculum(), Batch({"prompt": Column.strings(["a", "b"])})
    kept, asked = state.initial(PromptedPairs()), []
    for _ in range(6):
        kept, made = state.instruct(kept, batch, negatives=("bad", "less"), steps=2)
        asked.append(made.columns["instruction"].rows()[0])
    assert asked == ["bad", "bad", "less", "less", "less", "less"]  # the last stays


def test_the_longest_list_that_both_rank_alike() -> None:
    # By the judge 0 < 1 < 2 < 3; the policy agrees on 0, 2, 3 (-3 < -2 < -1), and finds 1 the best.
    assert longest_rise(np.array([0, 1, 2, 3]), np.array([-3, 0, -2, -1])) == [0, 2, 3]
    assert longest_rise(np.array([1, 1]), np.array([0, 1])) == [0]  # a tie is no order
    batch = Batch(
        {
            "old_log_probs": ragged([-3, -3], [0], [-2, -2], [-1], [-1], [-2]),
            "response_mask": masked(2, 1, 2, 1, 1, 1),
            "rewards": numbers(0, 1, 2, 3, 1, 2),
            "group_id": numbers(0, 0, 0, 0, 1, 1, dtype="int64"),
            "prompt": Column.strings(["p"] * 6),
            "response": Column.strings(list("abcdef")),
        }
    )
    made = agreed(batch)
    assert made.keep is not None and made.keep.tolist() == [0, 2, 3]
    # Of six pairs 1 is wrong with 2 and 3: tau 2 / 6; the other group has them the other way: -1.
    assert made.metrics["ranking_agreement"].value == pytest.approx((1 / 3 - 1) / 2)
    state = Demonstrations()
    kept, _ = state.remember(state.initial(CycleAlign()), batch.take(made.keep))
    assert kept["text"] == "Prompt: p\nFrom the best response to the worst:\n1. d\n2. c\n3. a\n\n"
    assert state.remember(kept, batch.slice(0, 0))[0] == kept
    assert state.shown(kept, batch)[1].columns["demonstrations"].rows() == [kept["text"]] * 6


def test_a_duel_is_where_the_best_response_is_least_known() -> None:
    # Row 0: scores 1, 3: mean 2, error 1 / sqrt(2). Row 1: 4, 4: error 0. Row 2: one score, 2: error 0. Row 3: 0, 4:
    # error sqrt(2).
    batch = Batch(
        {
            "row_id": numbers(10, 11, 12, 13, dtype="int64"),
            "rewards": numbers(2, 4, 2, 2),
            "group_id": numbers(0, 0, 1, 1, dtype="int64"),
        }
    )
    verdicts = Batch(
        {
            "parent_id": numbers(10, 10, 11, 11, 12, 12, 13, 13, dtype="int64"),
            "score": numbers(1, 3, 4, 4, 2, np.nan, 0, 4),
            "parsed": numbers(1, 1, 1, 1, 1, 0, 1, 1),
            "group_id": numbers(0, 0, 0, 0, 1, 1, 1, 1, dtype="int64"),
        }
    )
    made = bounds(batch, verdicts, width=2**0.5)
    np.testing.assert_allclose(values(made, "upper"), [3, 4, 2, 4], rtol=1e-6)
    np.testing.assert_allclose(values(made, "lower"), [1, 4, 2, 0], rtol=1e-6)
    # Group 0: 4 - 4; group 1: 4 - 2.
    known = Batch({**{name: batch[name] for name in batch}, **{name: made[name] for name in made}})
    chosen = least_known(known, share=0.5)
    assert chosen.keep is not None and chosen.keep.tolist() == [2, 3] and chosen.metrics["unknown"].value == 1
    three = Batch({"upper": numbers(1, 5, 2, 9), "group_id": numbers(0, 0, 0, 1, dtype="int64")})
    drawn = [duellists(three, rng=np.random.default_rng(seed)).keep for seed in range(20)]
    assert {tuple(one.tolist()) for one in drawn if one is not None} == {(0, 1), (1, 2)}  # the best, and either other
