"""Recipes on judges, critics, reflections and private clients, against values worked by hand."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from recipes.online_preference.eva import Eva, Pool, informative
from recipes.online_preference.popri import best_and_ranked, directions, private_scores
from recipes.policy_gradient.meta_policy import MetaPolicy, Rubric
from recipes.policy_gradient.relevance import regularised, repeated, words_in_common
from recipes.reasoning.refcritic import verdict_and_use
from recipes.reasoning.spark import known_verdicts, right_against_wrong, verdict_is_right
from rlhf_dist.batch import Batch, Column
from rlhf_dist.missing import MISSING, is_missing
from tests.recipes.rows import masked, numbers, values


def texts(*said: str) -> Column:
    return Column.strings(list(said))


def test_a_critic_is_paid_for_its_verdict_and_for_what_is_made_of_it() -> None:
    batch = Batch(
        {
            "choice": numbers(1, 1, 0, MISSING),
            "parsed": numbers(1, 1, 1, 0, dtype="uint8"),
            "solved": numbers(1, 0, 0, 1),
            "refined": numbers(0.5, 0, MISSING, 1),
        }
    )
    # Verdicts: right, wrong, right, none. Refined solutions: 1/2, 0, unknown, 1.
    found = verdict_and_use(batch, coef=2.0, right=0.5)
    rewards = found.columns["rewards"].values
    assert rewards[[0, 1, 3]].tolist() == [2, 0, 2] and is_missing(rewards)[2]
    assert found.metrics["verdict_right"].value == 0.5
    assert values(verdict_and_use(batch, coef=0.0, right=0.5).columns, "rewards") == [1, 0, 1, 0]


def test_a_policy_judges_its_own_right_and_wrong_responses() -> None:
    batch = Batch({"rewards": numbers(0, 1, 1, 1), "group_id": numbers(0, 0, 0, 1, dtype="int64")})
    known = known_verdicts(batch, right=0.5).columns
    assert values(known, "wanted") == [0, 1, 1, 1]
    said = batch.with_columns(wanted=known["wanted"], response=texts("a", "b", "c", "d"))
    pairs = right_against_wrong(said)  # group 1 has no wrong one
    assert pairs.parent is not None and pairs.parent.tolist() == [1, 0]
    assert pairs.columns["response_a"].rows() == ["b", "a"] and pairs.columns["response_b"].rows() == ["a", "b"]
    assert values(pairs.columns, "wanted") == [1, 0]
    verdicts = Batch(
        {
            "choice": numbers(1, 0, 0, MISSING),
            "parsed": numbers(1, 1, 1, 0, dtype="uint8"),
            "wanted": numbers(1, 1, 0, 0),
        }
    )
    assert values(verdict_is_right(verdicts).columns, "rewards") == [1, 0, 1, 0]


def states(*rows: tuple[float, float]) -> Column:
    return Column(np.array(rows, np.float32), np.arange(len(rows) + 1))


def test_clients_scores_are_cut_added_and_made_noisy() -> None:
    samples = Batch({"hidden": states((2, 0), (0, 5)), "response_mask": masked(1, 1)})
    clients = Batch({"hidden": states((3, 0), (1, 1)), "response_mask": masked(1, 1)})
    # Similarities (1, 0) and (1, 1) / sqrt 2, both of length 1; their mean.
    exact = private_scores(samples, clients, noise=0.0, longest=1.0, rng=np.random.default_rng(0))
    np.testing.assert_allclose(exact.columns["rewards"].values, [(1 + 1 / sqrt(2)) / 2, 1 / sqrt(2) / 2], rtol=1e-6)
    short = private_scores(samples, clients, noise=0.0, longest=0.5, rng=np.random.default_rng(0))
    np.testing.assert_allclose(short.columns["rewards"].values, exact.columns["rewards"].values / 2, rtol=1e-6)
    assert short.metrics["cut_clients"].value == 1.0
    rng = np.random.default_rng(0)
    drawn = np.stack(
        [
            private_scores(samples, clients, noise=2.0, longest=1.0, rng=rng).columns["rewards"].values
            for _ in range(500)
        ]
    )
    np.testing.assert_allclose(drawn.mean(0), exact.columns["rewards"].values, atol=0.15)
    np.testing.assert_allclose(drawn.std(0), [2 / 2, 2 / 2], rtol=0.1)  # sigma over clients
    empty = Batch({"hidden": Column(np.zeros((1, 2), np.float32), np.array([0, 0, 1])), "response_mask": masked(0, 1)})
    assert np.isfinite(directions(empty)).all()


def test_the_rejected_sample_is_of_a_middle_rank() -> None:
    batch = Batch({"rewards": numbers(1, 4, 2, 3, 5), "group_id": numbers(0, 0, 0, 0, 1, dtype="int64")})
    for rank, rejected in ((2, 3), (3, 2), (9, 0)):
        result = best_and_ranked(batch, rank=rank)
        assert result.keep is not None and sorted([1, rejected]) == result.keep.tolist()
        assert dict(zip(result.keep.tolist(), values(result.columns, "label"), strict=True)) == {1: 1, rejected: -1}


def test_a_rubric_is_written_anew_every_so_many_steps() -> None:
    state = Rubric()
    held = state.initial(MetaPolicy(rubric="old"))
    batch = Batch(
        {
            "group_id": numbers(0, 1, 2, dtype="int64"),
            "prompt": texts("p", "q", "r"),
            "response": texts("a", "b", "c"),
            "rewards": numbers(5, 1, 9),
        }
    )
    held, shown = state.show(held, batch)
    assert shown.columns["rubric"].rows() == ["old"] * 3
    held, none = state.due(held, batch, period=2, shown=2)
    assert none.columns.num_rows == 0
    held, due = state.due(held, batch, period=2, shown=2)
    assert due.columns["samples"].rows() == ["Prompt: q\nResponse: b\nGrade: 1.0\n\nPrompt: r\nResponse: c\nGrade: 9.0"]
    unread = Batch({"new_rubric": texts(""), "parsed": numbers(0, dtype="uint8")})
    kept, _ = state.revise(held, unread)
    assert kept["text"] == "old"
    changed, metrics = state.revise(held, Batch({"new_rubric": texts(" new "), "parsed": numbers(1, dtype="uint8")}))
    assert changed["text"] == "new" and metrics["revisions"].value == 1
    assert state.due(held, batch.slice(0, 0), period=1, shown=2)[1].columns.num_rows == 0


def test_prompts_evolve_where_responses_differ() -> None:
    # Groups differ by 3, 0 and 1: drawn with chances 3/4 and 1/4.
    batch = Batch({"rewards": numbers(0, 3, 1, 1, 2, 1), "group_id": numbers(0, 0, 1, 1, 2, 2, dtype="int64")})
    rng = np.random.default_rng(0)
    drawn = [informative(batch, count=1, rng=rng) for _ in range(400)]
    assert drawn[0].metrics["informativeness"].value == pytest.approx(4 / 3)
    firsts = [one.parent.tolist()[0] for one in drawn if one.parent is not None]
    assert set(firsts) == {0, 4} and np.mean(np.array(firsts) == 0) == pytest.approx(0.75, abs=0.06)
    both = informative(batch, count=9, rng=rng)
    assert both.parent is not None and both.parent.tolist() == [0, 4]  # nobody draws where nothing differs
    alike = informative(batch.slice(2, 4), count=1, rng=rng)
    assert alike.parent is not None and not len(alike.parent)


def test_new_prompts_live_for_a_step_and_have_ids_of_their_own() -> None:
    state, held = Pool(), Pool().initial(Eva())
    assert state.draw(held)[1].columns.num_rows == 0
    held, metrics = state.keep(held, Batch({"response": texts(" a ", "", "b")}))
    assert metrics["new_prompts"].value == 2
    held, drawn = state.draw(held)
    assert drawn.columns["question"].rows() == ["a", "b"] and values(drawn.columns, "group_id") == [-1, -2]
    held, _ = state.keep(held, Batch({"response": texts("c")}))
    assert values(state.draw(held)[1].columns, "group_id") == [-3]


def test_relevance_has_other_terms_for_open_and_closed_questions() -> None:
    assert repeated("a b c a b c") == pytest.approx(1 / 4)  # abc bca cab abc
    assert repeated("a b") == 0
    batch = Batch(
        {
            "rewards": numbers(0.5, 0.5, MISSING),
            "open": numbers(1, 0, 1),
            "response": texts("a b c a b c", "a b c a b c", "x"),
            "response_mask": masked(5, 5, 1),
        }
    )
    found = regularised(batch, longest=10).columns["rewards"].values
    # 0.5 * 5/10 * 3/4 and 0.5 * 3/4.
    np.testing.assert_allclose(found[:2], [0.1875, 0.375])
    assert is_missing(found)[2]
    assert words_in_common("how far", "far far away", "") == pytest.approx(2 / sqrt(2 * 5))
    assert words_in_common("how far", "Ten miles", "ten miles") == pytest.approx(1)
    assert words_in_common("?", "", "") == 0
