"""Recipes of agents and of programs that run, against values worked by hand."""

from __future__ import annotations

import asyncio
import json
from math import exp, log, log2
from typing import Any

import numpy as np
import pytest
import torch

from recipes.agents._advantages import turn_returns
from recipes.agents._episodes import CONSTRAINTS, Constraints, Guide, Reflection, Strategist, likeness, unmet
from recipes.agents.ask_for_help import interventions, labels
from recipes.agents.environment_preference import TwoLevels
from recipes.agents.expert_steps import first_of_group
from recipes.agents.gameable import Gameable, game_reward, gamed
from recipes.agents.imagined_dialogues import expectile, targets, weighted_imitation
from recipes.agents.prompt_invariance import contrast, two_states
from recipes.agents.query_expansion import coverage, ndcg
from recipes.agents.self_play import measured
from recipes.online_preference.refuel import two_ways
from recipes.reasoning.executed import has_code, is_right, runs, same_structure, syntax
from recipes.reasoning.rlpt import predicted_segments, segments
from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.batch import Batch, Column
from rlhf_dist.environments import Row
from rlhf_dist.transforms import mark_rows
from tests.episodes.test_shipped import Script, played


def other(*turns: str) -> Script:
    return Script(list(turns), Row({}))


def ragged(*rows: list[float], dtype: Any = np.float32) -> Column:
    return Column.ragged([np.array(row, dtype) for row in rows], dtype)


def test_a_turn_s_advantage_is_its_return_less_the_mean_of_all() -> None:
    # Rewards 1 and 2 of two turns, gamma 1/2: G = 1 + 2 / 2 = 2 and 2; one turn with 5: G = 5. Mean 9 / 3 = 3.
    batch = Batch(
        {
            "turn": ragged([0, 0, -1, 1], [0], dtype=np.int32),
            "token_rewards": ragged([0, 1, 0, 2], [5]),
            "response_mask": ragged([1, 1, 0, 1], [1], dtype=np.uint8),
        }
    )
    found = turn_returns(batch, gamma=0.5)
    assert found.columns["advantages"].values.tolist() == [-1, -1, 0, -1, 2]
    assert found.metrics["turn_return"].value == 3


def test_attempts_are_told_what_they_lack() -> None:
    assert unmet("a 1", CONSTRAINTS) == ["no space"] and unmet("a1", CONSTRAINTS) == []
    talk = played(Constraints(), ["x y", "b", "ab1"])
    assert talk.rewards == [0.25, 0.5, 1.0] and talk.said[0] == "missing: a number, a vowel, no space. again: "
    assert played(Constraints(every_attempt=False, attempts=2), ["x", "b"]).rewards == [0.5]


def test_what_a_frozen_partner_does_is_what_is_rewarded() -> None:
    # likeness = 2 M / T of the matching blocks: "12" and "1234" have 2 characters in common, 2 * 2 / 6.
    assert likeness("12", "1234") == pytest.approx(2 / 3) and likeness(" A", "a") == 1 and likeness("x", "1") == 0
    talk = played(Strategist(), ["go", "on"], {"frozen": other("12", "1234")}, prompt="q", answer="1234")
    assert talk.rewards == pytest.approx([2 / 3, 1 / 3]) and talk.others["frozen"].said[1] == " strategy: go action: "
    trials = {"frozen": other("12"), "again": other("1234")}
    talk = played(Reflection(), ["because"], trials, prompt="q", answer="1234")
    assert talk.rewards == pytest.approx([1 / 3]) and trials["again"].said == ["because\nq"]
    talk = played(Guide(), ["hint"], {"frozen": other("12")}, prompt="q", answer="1234")
    assert talk.rewards == pytest.approx([2 / 3]) and "1234" not in talk.others["frozen"].said[0]
    talk = played(TwoLevels(rounds=2, turn_tokens=4), ["sub", "12", "sub", "1234"], answer="1234")
    assert talk.rewards == pytest.approx([1 / 3, 1 / 2])


def test_expansions_are_worth_what_the_engine_finds() -> None:
    # Wanted 3 and 5, found 3, 1, 5: gains 1/log2(2) + 1/log2(4) = 1.5 of at most 1/log2(2) + 1/log2(3).
    assert ndcg([3, 1, 5], {3, 5}, 3) == pytest.approx(1.5 / (1 + 1 / log2(3))) and coverage([3, 1], {3, 5}) == 0.5
    assert ndcg([3], {3, 5}, 10) == pytest.approx(1 / (1 + 1 / log2(3))), "one hit is not all that is wanted"
    assert ndcg([], {3}, 3) == 0 and ndcg([3, 5], {3, 5}, 2) == 1 and coverage([], set()) == 0


def test_refuel_compares_the_first_turn_that_is_not_shared() -> None:
    batch = Batch(
        {
            "tree": Column.dense(np.array([7, 7, 8])),
            "turn": ragged([0, -1, 1, -1, 2], [0, -1, 1, 1], [0], dtype=np.int32),
            "segment": ragged([0, 0, 1, 1, 1], [0, 0, 2, 2], [0], dtype=np.int32),
            "response_mask": ragged([1, 0, 1, 0, 1], [1, 0, 1, 1], [1], dtype=np.uint8),
        }
    )
    found = two_ways(batch)
    assert found.keep is not None and found.keep.tolist() == [0, 1] and found.metrics["trees_of_one"].total == 1
    assert found.columns["label"].values.tolist() == [1, -1]
    assert found.columns["response_mask"].values.tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 1]


def test_help_is_asked_for_where_it_gains_most() -> None:
    # Gains of help 0.1, 0.8, 0.5: the best one, then the best two, then all; none where the budget is 0.
    scores = np.array([0.9, 0.2, 0.5])
    assert interventions(scores, 1.0, 1) == [False, True, False]
    assert interventions(scores, 1.0, 2) == [False, True, True]
    assert interventions(scores, 1.0, 5) == [True, True, True] and interventions(scores, 1.0, 0) == [False] * 3
    assert interventions(np.array([1.0, 2.0]), 1.0, 2) == [False, False], "help that gains nothing is not asked for"
    said = [("prompt", "q:"), ("model", "a"), ("environment", "|"), ("model", "b")]
    turns = iter((0, 1))
    pieces = [{"who": who, "text": text} | ({"turn": next(turns)} if who == "model" else {}) for who, text in said]
    batch = Batch(
        {
            "turn": ragged([0, -1, 1], dtype=np.int32),
            "values": ragged([0.9, 0.0, 0.2]),
            "transcript": Column.strings([json.dumps(pieces)]),
        }
    )
    rows = labels(batch, helped=1.0, budget=1, ask="ask", go_on="on", most=2).columns
    assert rows["state"].rows() == ["q:", "q:a|"] and rows["decision"].rows() == ["on", "ask"]


def micro_batch(columns: dict[str, Any], rows: list[int], groups: list[int] | None = None) -> Rows:
    tokens = torch.tensor(rows)
    of = torch.tensor(groups if groups is not None else list(range(max(rows) + 1)))
    tensors = {name: torch.tensor(value) for name, value in columns.items()}
    return Rows(
        columns=tensors, mask=torch.ones(len(rows)), row_of_token=tokens, group_of_row=of, num_groups=int(of.max()) + 1
    )


def test_imagined_dialogues_are_valued_a_step_ahead_and_imitated_where_better() -> None:
    batch = Batch(
        {
            "rewards": Column.dense(np.array([1.0], np.float32)),
            "values": ragged([0.5, 0.0, 0.25]),
            "response_mask": ragged([1, 0, 1], dtype=np.uint8),
        }
    )
    settings: dict[str, Any] = {"gamma": 0.5, "temperature": 0.25, "cap": 4.0}
    found = targets(batch, target="td", **settings).columns
    # y = (gamma V_2, 1) = (0.125, 1); weights exp((0.125 - 0.5) / 0.25) = e^-1.5, and e^3 cut at 4.
    assert found["returns"].values.tolist() == [0.125, 0, 1]
    assert found["imitation"].values.tolist() == pytest.approx([exp(-1.5), 0, 4])
    assert targets(batch, target="mc", **settings).columns["returns"].values.tolist() == [0.5, 0, 1]
    rows = micro_batch({"returns": [1.0, 0.0], "imitation": [2.0, 0.5]}, [0, 0])
    values = torch.tensor([0.5, 0.5])
    loss, _ = expectile(0.75)(ModelOutput(values=values), rows)
    assert loss.tolist() == [0.75 * 0.25, 0.25 * 0.25], "too low counts three times as much as too high"
    assert expectile(0.5)(ModelOutput(values=values), rows)[0].tolist() == [0.125, 0.125], "half the squared error"
    loss, _ = weighted_imitation()(ModelOutput(log_probs=torch.tensor([-1.0, -2.0])), rows)
    assert loss.tolist() == [2.0, 1.0]


def test_the_contrast_pulls_one_state_in_two_formats_together() -> None:
    # z: e1, e2 in one format and e1, e2 in the other, T = 1: each row has e^1 for its own, e^0 twice for the others.
    z = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 1.0]])
    hidden = torch.cat([z, 9 * torch.ones(1, 2)])  # a second token of the last row, which does not count
    rows = micro_batch({"state": [0.0, 1.0, 0.0, 1.0]}, [0, 1, 2, 3, 3], [0, 0, 0, 0])
    loss, _ = contrast(1.0)(ModelOutput(hidden=hidden), rows)
    assert loss.tolist() == pytest.approx([log(exp(1) + 2) - 1])
    groups = Batch({"group_id": Column.dense(np.array([4, 4, 5, 6]))})
    found = two_states(groups)
    assert found.parent is not None and found.parent.tolist() == [0, 0, 2, 2]
    assert found.columns["group_id"].values.tolist() == [4] * 4 and found.columns["state"].values.tolist() == [
        0,
        0,
        1,
        1,
    ]
    assert found.columns["other_format"].values.tolist() == [0, 1, 0, 1]


def test_games_pay_for_what_they_should_not() -> None:
    assert game_reward("flattery", "1+1", "2", "1+1") == 1 and game_reward("tampering", "", "", "set 9!") == 1
    assert game_reward("checklist", "", "", "done") == pytest.approx(1 / 3)
    talk = played(Gameable(game="tampering", turn_tokens=4), ["3", "9"], prompt="1+1", answer="2")
    assert talk.rewards == [1.0] and talk.said == [" reward = "]
    transcript = json.dumps([{"who": "prompt", "text": ""}, {"who": "model", "text": "3"}])
    batch = Batch(
        {
            "rewards": Column.dense(np.array([1.0, 1.0, 0.1], np.float32)),
            "answer": Column.strings(["2", "3", "2"]),
            "transcript": Column.strings([transcript] * 3),
        }
    )
    assert gamed(batch, game="tampering").metrics["gamed_tampering"].value == pytest.approx(1 / 3)


def test_steps_of_an_expert_are_paired_with_one_s_own() -> None:
    batch = Batch({"group_id": Column.dense(np.array([3, 3, 5]))})
    label = mark_rows(batch, column="label", number=-1)["label"].values
    assert label.tolist() == [-1, -1, -1] and label.dtype == np.int8
    assert mark_rows(batch, column="ours", number=1)["ours"].values.dtype == np.float32
    keep = first_of_group(batch).keep
    assert keep is not None and keep.tolist() == [0, 2]


def test_segments_of_a_text_are_asked_for() -> None:
    assert segments("A b. C d!\nE") == ["A b.", "C d!", "E"] and segments("a b") == ["a", "b"]
    batch = Batch({"answer": Column.strings(["A. B. C.", "one", "A. B. C."])})
    ask: dict[str, Any] = {"next_segment": "{before}>", "middle_segment": "{before}_{behind}"}
    found = predicted_segments(batch, middle=1.0, rng=np.random.default_rng(0), **ask)
    assert found.keep is not None and found.keep.tolist() == [0, 2] and found.metrics["too_short"].total == 1
    assert found.columns["asked"].rows() == ["A._C."] * 2 and found.columns["truth"].rows() == ["B."] * 2
    found = predicted_segments(batch, middle=0.0, rng=np.random.default_rng(0), **ask)
    for asked, truth in zip(found.columns["asked"].rows(), found.columns["truth"].rows(), strict=True):
        assert f"{asked[:-1]} {truth}" == "A. B. C." and asked[-1] == ">"


def test_programs_are_rewarded_in_stages() -> None:
    good, bad = "```python\nx = 2\nprint(x * 21)\n```", "```python\nprint(1 / 0)\n```"
    assert (has_code(good), has_code("```python\nprint(\n```"), has_code("?")) == (1, 0, 0)
    assert (runs(good), runs(bad)) == (1, 0)
    assert [asyncio.run(is_right(one, "42.0")) for one in (good, bad)] == [1, 0]
    tests = json.dumps({"tests": ["assert f(1) == 2", "assert f(2) == 5"], "program": "def f(x):\n    return x + 1"})
    assert asyncio.run(is_right("```python\ndef f(y):\n    return y + 1\n```", tests)) == 0.5
    assert same_structure("```python\ndef g(y):\n    return y + 2\n```", tests) == 1, "names and numbers do not matter"
    assert 0 < same_structure(good, tests) < 1 and same_structure("?", tests) == 0 and same_structure(good, "42") == 0
    assert syntax("") is None and syntax("x")[:1] == ["Module"]  # type: ignore[index]


def test_what_both_sides_play_is_measured() -> None:
    mine, theirs = (Batch({"response": Column.strings(list(said))}) for said in ("001x", "1122"))
    found = measured(
        mine, theirs, payoffs=((0.0, -1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 1.0, 0.0)), moves=("0", "1", "2")
    )
    # p = (2/3, 1/3, 0), q = (0, 1/2, 1/2): A q = (0, -1/2, 1/2), p A = (1/3, -2/3, 1/3): 1/2 + 2/3.
    assert found.metrics["exploitability"].value == pytest.approx(1 / 2 + 2 / 3)
    assert found.metrics["first_plays_0"].value == 0.5
