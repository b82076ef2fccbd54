"""Rule rewards: plain functions of prompt, response and answer, applied to the rows of a batch.

    def my_reward(prompt: str, response: str, answer: str) -> float: ...

A function may return a dict of finite numbers instead: its `reward` is the reward, the others are named
scores that are reported beside it. A function with a parameter named as one of ASKED gets that column too:
`raw_response` is the response with its special tokens, for format tags that are such tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult
from rlhf_dist.metrics import Mean, Metrics, reward_metrics

RuleReward = Callable[..., "float | dict[str, float]"]
ASKED = ("raw_response", "source", "fields")
"""Columns that a function is given where it has a parameter of that name."""


class RewardFunctionError(RuntimeError):
    """A reward function raised, or returned what is no finite number. Never turned into a reward of 0."""


def score_rows(
    function: RuleReward,
    prompts: Sequence[str],
    responses: Sequence[str],
    answers: Sequence[str],
    asked: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[float]]:
    """`reward` and any named scores, each one number per row. asked: more columns, passed by name.

    Raises RewardFunctionError naming the function and the row, with the row's texts.
    """
    scored: dict[str, list[float]] = {"reward": []}
    for row, (prompt, response, answer) in enumerate(zip(prompts, responses, answers, strict=True)):
        where = _where(function, row, prompt, response, answer)
        try:
            returned = function(prompt, response, answer, **{name: one[row] for name, one in (asked or {}).items()})
        except Exception as error:
            raise RewardFunctionError(f"{where} raised {type(error).__name__}: {error}") from error
        scores = returned if isinstance(returned, dict) else {"reward": returned}
        if "reward" not in scores:
            raise RewardFunctionError(f"{where} returned a dict without 'reward': {_short(repr(returned))}")
        finite = {name: _finite(value, name, where) for name, value in scores.items()}
        if row and set(scores) != set(scored):
            raise RewardFunctionError(
                f"{where} must return the same names for every row, got {sorted(scores)} after {sorted(scored)}"
            )
        for name, value in finite.items():
            scored.setdefault(name, []).append(value)
    return scored


def rule_rewards(function: RuleReward, batch: Batch) -> HostResult:
    """The `rewards` column [B] from the columns prompt, response and answer, with mean scores as metrics.

    Raises RewardFunctionError as `score_rows` does.
    """
    asked = {name: batch[name].rows() for name in ASKED if name in inspect.signature(function).parameters}
    scored = score_rows(function, batch["prompt"].rows(), batch["response"].rows(), batch["answer"].rows(), asked)
    rewards = Column(np.asarray(scored["reward"], dtype=np.float32))
    scores: Metrics = {
        f"score/{name}": Mean(math.fsum(values), batch.num_rows) for name, values in scored.items() if name != "reward"
    }
    return HostResult(
        columns=Batch({"rewards": rewards}, batch.num_rows), metrics=reward_metrics(rewards.values) | scores
    )


def _finite(value: object, name: str, where: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise RewardFunctionError(f"{where} returned {name} = {_short(repr(value))}, not a number") from None
    if not math.isfinite(number):
        raise RewardFunctionError(f"{where} returned {name} = {number}; it must be finite")
    return number


def _where(function: RuleReward, row: int, prompt: str, response: str, answer: str) -> str:
    name = getattr(function, "__qualname__", repr(function))
    return (
        f"reward function {name} for row {row} (prompt {_short(repr(prompt))}, response {_short(repr(response))}, "
        f"answer {_short(repr(answer))})"
    )


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
