"""Rewards of text, and several of them as one."""

from __future__ import annotations

import asyncio
from typing import Any

import cloudpickle
import pytest

from rlhf_dist.batch import Batch, Column
from rlhf_dist.rewards import (
    exact_match,
    has_format,
    in_length,
    json_match,
    regex_match,
    rule_rewards,
    valid_json,
    weighted,
)
from rlhf_dist.rewards.load import load_reward
from rlhf_dist.rewards.signature import signature_of


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ('{"a": 1, "b": [1.0, null]}', '{"b": [1, null], "a": 1}', 1.0),
        ('So:\n```json\n{"a": 2}\n```', '{"a": 2}', 1.0),
        ('```\n{"a": 1}\n```\n```json\n{"a": 2}\n```', '{"a": 1}', 0.0),
        ("true", "1", 0.0),
        ("[1, 2]", "[2, 1]", 0.0),
        ("null", "null", 1.0),
        ("no json", "null", 0.0),
        ("[" * 100_000, "[]", 0.0),
    ],
)
def test_json_is_compared_as_data(response: str, answer: str, reward: float) -> None:
    assert json_match(response, answer) == reward


def test_an_answer_that_is_no_json_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be JSON"):
        json_match("{}", "{a}")
    assert valid_json("{}") == 1.0 and valid_json("{a}") == 0.0


def test_the_last_match_of_a_pattern_is_the_answer() -> None:
    reward = regex_match(r"Answer: (\d+)")
    assert reward("Answer: 1. No, Answer: 2", "2") == 1.0 and reward("Answer: 2. No, Answer: 1", "2") == 0.0
    assert reward("2", "2") == 0.0 and regex_match(r"\d")("a 7", " 7 ") == 1.0
    assert regex_match("a(b)?")("a", "b") == 0.0
    with pytest.raises(ValueError, match="not a regular expression"):
        regex_match("(")


def test_a_format_is_that_of_the_whole_response() -> None:
    reward = has_format("<think>.*</think>.+")
    assert reward(" <think>a\nb</think> 3\n") == 1.0
    assert reward("x <think>a</think> 3") == 0.0 and reward("<think>a</think>") == 0.0


@pytest.mark.parametrize(("tokens", "reward"), [(0, 0.0), (1, 0.5), (2, 1.0), (4, 1.0), (5, 0.5), (6, 0.0), (9, 0.0)])
def test_a_length_falls_evenly_outside_its_bounds(tokens: int, reward: float) -> None:
    assert in_length(4, least=2, slack=2)([0] * tokens) == reward
    assert in_length(4, least=2)([0] * tokens) == float(2 <= tokens <= 4)


def test_lengths_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="0 <= least <= most"):
        in_length(2, least=3)


async def waits(response: str) -> dict[str, float]:
    await asyncio.sleep(0)
    return {"reward": 1.0, "words": len(response.split())}


def test_a_sum_takes_what_its_terms_take_and_names_each() -> None:
    both = weighted(right=(1.0, exact_match), form=(0.5, has_format("[0-9]+")))
    signature = signature_of(both)
    assert dict(signature.parameters) == {"prompt": True, "response": True, "answer": True}
    batch = Batch({name: Column.strings(["3", "4", "a"]) for name in ("prompt", "response")}).with_columns(
        answer=Column.strings(["3", "3", "3"])
    )
    result = rule_rewards(both, batch)
    assert result.columns["rewards"].values.tolist() == [1.5, 0.5, 0.0]
    assert result.metrics["score/right"].value == pytest.approx(1 / 3)
    assert result.metrics["score/form"].value == pytest.approx(2 / 3)
    again = cloudpickle.loads(cloudpickle.dumps(both))
    assert again(prompt="", response="3", answer="3") == {"reward": 1.5, "right": 1.0, "form": 1.0}


def test_one_term_that_waits_makes_the_sum_wait() -> None:
    both = weighted(right=(1.0, exact_match), slow=(-2.0, waits))
    scores = asyncio.run(both(prompt="", response="a b", answer="a b"))
    assert scores == {"reward": -1.0, "right": 1.0, "slow": 1.0, "slow/words": 2.0}


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "at least one term"),
        ({"reward": (1.0, exact_match)}, "their sum"),
        ({"right": exact_match}, "is \\(weight, function\\)"),
        ({"right": (1.0, lambda completions: completions)}, "takes lists"),
    ],
)
def test_what_is_no_term_is_said(terms: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted(**terms)


def test_it_is_named_in_a_file_like_any_reward(tmp_path: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from rlhf_dist.rewards import code_tests, has_format, weighted\n"
        "both = weighted(code=(1.0, code_tests), form=(0.1, has_format('.*```')))\n"
    )
    assert dict(load_reward(f"{file}:both").signature.parameters) == {"response": True, "answer": True}
