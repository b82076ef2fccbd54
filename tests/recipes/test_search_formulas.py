"""What recipes do with trees, searches and refinements, against values worked by hand."""

from __future__ import annotations

import json
from math import exp, log

import numpy as np
import pytest

from recipes.agents.reex_sql import Database, composite, run_sql
from recipes.reasoning.b_star import balance, balanced
from recipes.reasoning.critique_grpo import shaped_likelihood
from recipes.reasoning.smart import as_first_attempt
from recipes.reasoning.tpo import contrast
from recipes.search.agent_r import recoveries
from recipes.search.guided_decoding import as_state, chosen_states, one_step_more, whole_text
from recipes.search.q_probe import Probe, QProbe, expected_reward
from recipes.search.step_preferences import visit_smoothed
from rlhf_dist.algorithms import dpo
from rlhf_dist.batch import Batch, Column
from rlhf_dist.environments import PolicyError
from tests.episodes.test_shipped import played
from tests.recipes.rows import gradient, masked, numbers, of_rows, ragged, values


def rows_of(batch: Batch, name: str) -> list[list[int]]:
    return [row.tolist() for row in batch[name].rows()]


def test_mcts_dpos_labels_are_smoothed_by_visits() -> None:
    # beta D = 0.5 (1 - (-1)) = 1; a = 1 / (3 / 1 + 1) = 1/4.
    columns = {"label": [1, -1], "ref_log_probs": [-2.0, -2.0], "leaves": [3, 1]}
    (found,) = of_rows(visit_smoothed(0.5), [-1.0, -3.0], columns, [1, 1], [0, 0])
    assert found == pytest.approx(0.75 * log(1 + exp(-1)) + 0.25 * log(1 + exp(1)))
    alike = {**columns, "leaves": [1, 0]}  # no visit of the worse: DPO
    (plain,) = of_rows(dpo(0.5), [-1.0, -3.0], columns, [1, 1], [0, 0])
    assert of_rows(visit_smoothed(0.5), [-1.0, -3.0], alike, [1, 1], [0, 0]) == pytest.approx([plain])


def test_a_refined_token_counts_by_its_probability() -> None:
    # p = 1/4 and gamma = 1/4: f = 1/2, -A f = -1; at log p its gradient is -A p gamma / (p + gamma)^2 = -1/2.
    loss, given = shaped_likelihood(0.25), {"advantages": [2.0]}
    assert of_rows(loss, [log(0.25)], given, [1]) == pytest.approx([-1.0])
    assert gradient(loss, [log(0.25)], given, [1]) == pytest.approx([-0.5])


def test_b_stars_balance_is_of_unique_right_responses() -> None:
    # 2 of 4 are right and unique: min(2 / 4, 1) * 2 / 4.
    assert balance(["a", "a", "b", "c"], [True, True, True, False], wanted=4) == 0.25
    assert balance(["a", "b"], [True, True], wanted=2) == 1 and balance([], [], wanted=2) == 0
    batch = Batch(
        {
            "rewards": numbers(1, 0, 1, 1),
            "scored": numbers(0, -1, 0, 0),
            "temperature": numbers(0.5, 0.5, 1, 1),
            "response": Column.strings(["a", "b", "a", "c"]),
            "group_id": numbers(0, 0, 0, 0, dtype="int64"),
        }
    )
    # Cold: 1/2 * 1/2 without a threshold, 1/2 * 1 above 0. Hot: 2/2 * 1, which is taken.
    result = balanced(batch, thresholds=(-9.0, 0.0), wanted=2, right=1)
    assert result.keep is not None and result.keep.tolist() == [2, 3]
    assert {name: metric.value for name, metric in result.metrics.items()} == {
        "balance": 1,
        "temperature": 1,
        "threshold": -9,
    }


def test_tpo_contrasts_the_best_with_the_worst() -> None:
    batch = Batch(
        {
            "rewards": numbers(0, 2, 1, 5),
            "response": Column.strings(["a", "b", "c", "d"]),
            "group_id": numbers(4, 4, 4, 7, dtype="int64"),
        }
    )
    result = contrast(batch)
    assert result.keep is not None and result.keep.tolist() == [1, 3]
    assert result.columns["best"].rows() == ["b", "d"] and result.columns["worst"].rows() == ["a", "d"]


def test_a_retry_is_learned_as_a_first_attempt() -> None:
    batch = Batch(
        {
            "asked_ids": ragged([1, 2], dtype="int32"),
            "prompt_ids": ragged([1, 2, 8, 9], dtype="int32"),
            "response_ids": ragged([5], dtype="int32"),
        }
    )
    made = as_first_attempt(batch)
    assert rows_of(made, "prompt_ids") == [[1, 2]] and rows_of(made, "response_ids") == [[8, 9, 5]]
    assert rows_of(made, "response_mask") == [[1, 1, 1]]


def test_agent_rs_loss_is_on_the_good_end_alone() -> None:
    batch = Batch(
        {
            "rewards": numbers(1, 0, 1),
            "turns": numbers(2, 2, 1, dtype="int32"),
            "turn": ragged([0, 0, -1, 1], [0, -1, 1], [0], dtype="int32"),
            "response_mask": ragged([1, 1, 0, 1], [1, 0, 1], [1], dtype="uint8"),
        }
    )
    result = recoveries(batch)
    assert result.keep is not None and result.keep.tolist() == [0]
    assert rows_of(result.columns, "response_mask") == [[0, 0, 0, 1]] and result.metrics["recovered"].value == 0.5


def test_a_state_grows_by_its_steps() -> None:
    batch = Batch(
        {
            "so_far": Column.strings(["a", "b"]),
            "response": Column.strings(["x", "y"]),
            "finished": numbers(0, 1, dtype="uint8"),
            "prompt_ids": ragged([1], [2], dtype="int32"),
            "response_ids": ragged([5, 6], [7], dtype="int32"),
        }
    )
    grown = one_step_more(batch)
    assert grown["so_far"].rows() == ["ax", "by"] and values(grown, "ended") == [0, 1]
    assert rows_of(as_state(batch), "prompt_ids") == [[1, 5, 6], [2, 7]]
    ahead = Batch({**grown, "response": Column.strings(["...", "..."])})
    assert whole_text(ahead, ahead=True)["response"].rows() == ["ax...", "by"], "what ended has no look-ahead"


def test_states_are_the_best_or_drawn_by_their_value() -> None:
    batch = Batch({"rewards": numbers(0, 2, 2, 1, 3), "group_id": numbers(0, 0, 0, 0, 1, dtype="int64")})
    given = {"width": 2, "beta": 0.5}
    best = chosen_states(batch, **given, pick="best", rng=np.random.default_rng(0))
    assert best.keep is not None and best.keep.tolist() == [1, 2, 4]
    two = Batch({"rewards": numbers(0, log(3) / 2), "group_id": numbers(0, 0, dtype="int64")})
    drawn = [
        chosen_states(two, width=1, beta=0.5, pick="resample", rng=np.random.default_rng(seed)).keep
        for seed in range(400)
    ]
    # exp(V / beta) is 1 and 3.
    assert np.mean([keep[0] for keep in drawn if keep is not None]) == pytest.approx(0.75, abs=0.06)


def test_a_probe_is_ridge_regression_and_chooses_by_it() -> None:
    states = [[1.0, 0], [0, 1.0], [1.0, 0], [0, 1.0]]
    batch = Batch(
        {
            "hidden": Column(np.array([[9.0, 9], *states[:1], *states[1:]], np.float32), np.array([0, 2, 3, 4, 5])),
            "response_mask": masked(2, 1, 1, 1),
            "rewards": numbers(1, 0, 1, 0),
            "group_id": numbers(0, 0, 1, 1, dtype="int64"),
        }
    )
    state = Probe()
    first, before = state.learn(state.initial(QProbe()), batch, beta=0.5, ridge=1.0)
    assert before.metrics["probed_reward"].value == 0.5 and before.metrics["squared_error"].value == 0.5
    # w = (2 + 1)^-1 (2, 0): q is 2/3 and 0, and softmax of 4/3 and 0 takes the first with 1 / (1 + e^(-4/3)).
    _, after = state.learn(first, batch, beta=0.5, ridge=1.0)
    assert after.metrics["probed_reward"].value == pytest.approx(1 / (1 + exp(-4 / 3)))
    assert expected_reward(np.zeros(2), np.array([1.0, 0]), [np.arange(2)], 0.5).tolist() == [0.5]


def test_sql_reads_and_nothing_else() -> None:
    schema = "create table t(a); insert into t values (1), (2);"
    assert run_sql(schema, "select sum(a) from t") == [(3,)]
    assert composite(True, True, 3, parsed=0.1, explore=0.4) == pytest.approx(1 + 0.1 + 0.4 * 0.75)
    endless = "with recursive n(x) as (select 1 union all select x + 1 from n) select max(x) from n"
    for query in (
        "drop table t",
        "insert into t values (3)",
        "attach '/tmp/other.db' as other",
        "pragma journal_mode",
        "select zeroblob(900000000)",
        "select nothing",
        endless,
    ):
        with pytest.raises(PolicyError, match="the query does not run"):
            run_sql(schema, query)


def test_an_answer_of_sql_is_worth_what_its_rows_are() -> None:
    row = {"answer": "select 1", "fields": json.dumps({"schema": "create table t(a); insert into t values (1);"})}

    def of(*turns: str) -> float:
        return played(Database(), turns, **row).rewards[0]

    # right 1, parsed 0.1, explore 0.1 (1 - 1 / (1 + k)) of k different queries that ran
    assert of("<sql>select a from t</sql>", "<answer>select a from t</answer>") == pytest.approx(1 + 0.1 + 0.1 / 2)
    assert of("<sql>select b</sql>", "<answer>select 1</answer>") == pytest.approx(1.1), "a query that does not run"
    assert of("<answer>select 2</answer>") == pytest.approx(0.1) and of("who knows") == 0.0
    said = played(Database(), ["<sql>select a from t</sql>", "<answer>select 1</answer>"], **row).said
    assert said == ["\n(1,)\n"]
