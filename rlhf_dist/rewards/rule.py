"""From outcomes of rows to the `rewards` column and metrics; what goes wrong names function and row.

    def my_reward(prompt: str, response: str, answer: str) -> float: ...

A function may return a dict of finite numbers instead: its `reward` is the reward, the others are named
scores that are reported beside it. `signature.py` says what else a function may look like.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult
from rlhf_dist.failure import FailureKind
from rlhf_dist.metrics import Mean, reward_metrics
from rlhf_dist.missing import is_missing
from rlhf_dist.rewards.calls import NOT_CALLED, Calls, Outcome, Scores, short
from rlhf_dist.rewards.signature import Signature, signature_of
from rlhf_dist.schema import COLUMNS

FIELDS = "fields"
"""Column of the data file's other fields, as JSON."""


class RewardFunctionError(RuntimeError):
    """A reward function failed, or returned what is no finite number. Never turned into a reward of 0 unasked."""

    failure_kind = FailureKind.CODE


def rule_rewards(function: Any, batch: Batch) -> HostResult:
    """Rewards of a batch in this process and without limits: for trying a function. A run has `ScoringProcess`.

    Raises RewardFunctionError naming the function and the row, with the row's texts.
    """
    signature, outcomes = signature_of(function), list[Outcome]()
    calls = Calls(function, signature, timeout_s=math.inf, concurrency=1, alone=False)
    if batch.num_rows:
        for finished in calls.run(arguments(signature, batch), batch.num_rows, [0.0] * batch.num_rows):
            outcomes += finished.outcomes
    return reward_columns(signature.name, batch, outcomes)


def arguments(signature: Signature, batch: Batch) -> dict[str, list[Any]]:
    """Parameter -> its value in each row: text, numbers, lists of numbers, or what the data file has in a field.

    Raises ValueError naming a parameter that no column and no field can fill.
    """
    fields = _fields(signature, batch)
    extras = {*fields, *(name for name in batch if name not in COLUMNS and name != FIELDS)}
    bound = signature.bind(list(batch), extras)
    return {
        parameter: _plain(batch[column]) if column in batch else fields[column] for parameter, column in bound.items()
    }


def reward_columns(name: str, batch: Batch, outcomes: Sequence[Outcome], failed: float | None = None) -> HostResult:
    """The `rewards` column [B] of the function called `name`, with mean scores as metrics.

    `failed`: the reward of rows without scores, which are counted (`missing.MISSING` for none); None: they raise
    RewardFunctionError.
    """
    failures = [(row, outcome) for row, outcome in enumerate(outcomes) if isinstance(outcome, str)]
    if failures and failed is None:
        row, text = min(failures, key=lambda failure: failure[1] == NOT_CALLED)
        raise RewardFunctionError(f"{_where(name, batch, row)} {text}")
    scored: dict[str, list[float]] = {}
    rewards, seen = list[float](), list[Scores]()
    for row, outcome in enumerate(outcomes):
        if isinstance(outcome, str):
            assert failed is not None, "raised above"
            rewards.append(failed)
            continue
        if seen and outcome.keys() != seen[0].keys():
            raise RewardFunctionError(
                f"{_where(name, batch, row)} must return the same names for every row, got {sorted(outcome)} after "
                f"{sorted(seen[0])}"
            )
        seen.append(outcome)
        rewards.append(outcome["reward"])
        for score, value in outcome.items():
            scored.setdefault(score, []).append(value)
    column = Column(np.asarray(rewards, dtype=np.float32))
    known = column.values[~is_missing(column.values)]
    metrics = reward_metrics(known)
    for score, values in scored.items():
        if score != "reward":
            metrics[f"score/{score}"] = Mean(math.fsum(values), len(values))
    if failed is not None:
        metrics["failed_rows"] = Mean(float(len(outcomes) - len(seen)), 0)
    return HostResult(columns=Batch({"rewards": column}, len(outcomes)), metrics=metrics)


def _fields(signature: Signature, batch: Batch) -> dict[str, list[Any]]:
    """The data file's other fields, where the function has a use for them: field -> its value in each row."""
    wanted = [*signature.parameters, *signature.columns.values()]
    if FIELDS not in batch or not (signature.rest or any(name not in batch for name in wanted)):
        return {}
    rows = [json.loads(row) if row else {} for row in batch[FIELDS].rows()]
    names = dict.fromkeys(name for row in rows for name in row if name not in batch)
    return {name: [row.get(name) for row in rows] for name in names}


def _plain(column: Column) -> list[Any]:
    if column.text:
        return column.rows()
    if column.offsets is None:
        return list(column.values.tolist())
    return [row.tolist() for row in column.rows()]


def _where(name: str, batch: Batch, row: int) -> str:
    """The function and a row, with the row's texts."""
    texts = ", ".join(
        f"{column} {short(repr(batch[column].row(row)))}"
        for column in ("prompt", "response", "answer")
        if column in batch
    )
    return f"reward function {name} for row {row} ({texts})"
