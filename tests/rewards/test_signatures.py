"""What a reward function takes is read from its parameters' names, in the three ways people write them."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_dist.batch import Batch, Column
from rlhf_dist.rewards import RewardFunctionError, adapt, rule_rewards
from rlhf_dist.rewards.signature import signature_of

ROWS = Batch(
    {
        "prompt": Column.strings(["p", "q"]),
        "response": Column.strings(["1", "22"]),
        "answer": Column.strings(["1", "3"]),
        "source": Column.strings(["gsm", "gsm"]),
        "finished": Column.dense([1, 0]),
        "response_ids": Column.ragged([[5], [6, 7]]),
        "fields": Column.strings([json.dumps({"level": 3, "extra_info": {"index": i}}) for i in (4, 5)]),
    }
)


def rewards(function: Any, batch: Batch = ROWS) -> list[float]:
    found: list[float] = rule_rewards(function, batch).columns["rewards"].values.tolist()
    return found


def named(finished: int, response_ids: list[int], level: int, scale: float = 2.0) -> float:
    return scale * level * finished + len(response_ids)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, int] | None = None, **kwargs: Any
) -> dict[str, float]:
    assert data_source == "gsm" and extra_info is not None
    return {"score": float(solution_str == ground_truth), "index": extra_info["index"]}


def trl(prompts: list[str], completions: list[str], answer: list[str], **columns: list[Any]) -> list[float]:
    assert prompts == ["p", "q"] and columns["level"] == [3, 3]
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


async def later(response: str) -> float:
    await asyncio.sleep(0)
    return float(response)


async def later_together(completions: list[str]) -> list[float]:
    return list(await asyncio.gather(*map(later, completions)))


class Counts:
    """Has state: how many rows it has seen."""

    def __init__(self, first: int = 0) -> None:
        self.seen = first

    def __call__(self, response: str) -> float:
        self.seen += 1
        return self.seen


class LaterCounts(Counts):
    async def __call__(self, response: str) -> float:  # type: ignore[override]
        return super().__call__(response)


def columns_in(completions: list[str]) -> dict[str, list[float]]:
    return {"reward": [1.0, 2.0], "length": [float(len(text)) for text in completions]}


def theirs(text: str, gold: str) -> float:
    return float(text == gold)


def theirs_together(texts: list[str]) -> list[float]:
    return [float(text) for text in texts]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (named, [7, 2]),
        (compute_score, [1, 0]),
        (trl, [1, 0]),
        (later, [1, 22]),
        (later_together, [1, 22]),
        (Counts, [1, 2]),
        (LaterCounts, [1, 2]),
        (Counts(10), [11, 12]),
        (columns_in, [1, 2]),
        (functools.partial(named, scale=0.0), [1, 2]),
        (adapt(theirs, text="response", gold="answer"), [1, 0]),
        (adapt(theirs_together, batched=True, texts="response"), [1, 22]),
    ],
)
def test_functions_are_called_as_their_parameters_say(function: Any, expected: list[float]) -> None:
    assert rewards(function) == expected


def test_the_data_s_own_column_comes_before_the_one_a_name_stands_for() -> None:
    def f(ground_truth: str, data_source: str) -> float:
        return float(ground_truth == "own") + 2 * float(data_source == "own")

    fields = Column.strings([json.dumps({"ground_truth": "own", "data_source": "own"})] * 2)
    assert rewards(f, ROWS.with_columns(fields=fields)) == [3, 3]
    assert rewards(f, ROWS.drop("fields")) == [0, 0]


def test_verl_s_extra_info_is_empty_where_the_data_has_none() -> None:
    def f(solution_str: str, extra_info: dict[str, Any]) -> float:
        return float(extra_info == {})

    assert rewards(f, ROWS.drop("fields")) == [1, 1]


def test_named_scores_of_batched_functions_and_verl_s_score_are_metrics() -> None:
    found = {name: metric.value for name, metric in rule_rewards(columns_in, ROWS).metrics.items()}
    assert found == {"reward": 1.5, "reward_std": 0.5, "score/length": 1.5}
    assert rule_rewards(compute_score, ROWS).metrics["score/index"].value == 4.5


def both(prompt: str, completions: list[str]) -> float:
    return 0.0


def anything(*values: str) -> float:
    return 0.0


def only_rest(**columns: Any) -> float:
    return 0.0


class Needs:
    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, response: str) -> float:
        return 0.0


class NoCall:
    pass


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (both, "both takes both 'completions' .lists. and 'prompt' .one row.*adapt.function, batched=True"),
        (anything, "anything takes 'values', which has no name to go by.*prompt, response, answer"),
        (only_rest, "takes nothing it names"),
        (max, "max (takes|does not say what it takes)"),
        (Needs, r"class that needs path to be made; name an instance instead \(scorer = Needs"),
        (NoCall, "class whose instances cannot be called"),
        (adapt(theirs, txt="response"), "no parameter 'txt'; it has text, gold"),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_rule(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        signature_of(function)


def test_a_parameter_that_is_no_column_is_named_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"theirs asks for 'text', and there is no column 'text'; there is answer, "):
        rule_rewards(theirs, ROWS)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "row 0 .*one reward for each of 2 rows, got 1"),
        (1.0, "row 0 .*takes lists, so it must return one, got 1.0"),
        ([1.0, None], r"row 1 .*returned reward = None, not a number"),
        ({"reward": [1.0, 2.0], "part": [1.0]}, "one reward for each of 2 rows, got 1"),
    ],
)
def test_a_batched_function_must_answer_for_every_row(returned: object, message: str) -> None:
    def faulty(completions: list[str]) -> object:
        return returned

    with pytest.raises(RewardFunctionError, match=message):
        rule_rewards(faulty, ROWS)


def test_a_coroutine_that_nobody_awaits_is_an_error() -> None:
    def forgot(response: str) -> Any:
        waiting: Callable[[str], Any] = later
        return waiting(response)

    with pytest.raises(RewardFunctionError, match="write `async def`, or await it"):
        rule_rewards(forgot, ROWS)
