"""Metrics that add up: each is carried so that shards and ranks combine to what the whole batch would give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Metric(Protocol):
    """A number over some things that combines with the same number over others by `+`."""

    def __add__(self, other: Any, /) -> Any: ...

    @property
    def value(self) -> float:
        """What is reported."""
        ...


@dataclass(frozen=True)
class Mean:
    """A mean over `count` things (tokens, rows, groups); a count that is not to be averaged has count 0."""

    total: float
    count: float = 1.0

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """total / count, or the plain total where there is no count."""
        return self.total / self.count if self.count else self.total


@dataclass(frozen=True)
class Largest:
    """The largest of some numbers."""

    value: float

    def __add__(self, other: Largest) -> Largest:
        return Largest(max(self.value, other.value))


@dataclass(frozen=True)
class Spread:
    """Standard deviation with divisor n: count, mean and summed squared distances from it, which combine without the
    cancellation of a sum of squares (Chan, Golub and LeVeque 1983, eq. 2.1)."""

    count: float
    mean: float
    squares: float

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Spread:
        """Of the values of one shard; 0 for none."""
        if not len(values):
            return cls(0.0, 0.0, 0.0)
        mean = float(values.mean(dtype=np.float64))
        return cls(float(len(values)), mean, float(np.square(values.astype(np.float64) - mean).sum()))

    def __add__(self, other: Spread) -> Spread:
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart**2 * self.count * other.count / count
        return Spread(count, self.mean + apart * other.count / count, squares)

    @property
    def value(self) -> float:
        """The standard deviation; 0 of nothing."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


@dataclass(frozen=True)
class ExplainedVariance:
    """1 - Var(target - guess) / Var(target): 1 for a critic that is right, 0 for one that says a constant, below 0 for
    one that is worse than that."""

    missed: Spread
    target: Spread

    @classmethod
    def of(cls, guess: npt.NDArray[Any], target: npt.NDArray[Any]) -> ExplainedVariance:
        """Of one shard, both [N]."""
        return cls(Spread.of(target.astype(np.float64) - guess), Spread.of(target))

    def __add__(self, other: ExplainedVariance) -> ExplainedVariance:
        return ExplainedVariance(self.missed + other.missed, self.target + other.target)

    @property
    def value(self) -> float:
        """Targets that are all equal leave nothing to explain: 1 where the guess is right, else 0, as in scikit-learn's
        `explained_variance_score`."""
        if self.target.squares == 0.0:
            return float(self.missed.squares == 0.0)
        return 1.0 - self.missed.squares / self.target.squares


Metrics = dict[str, Metric]


def combine(parts: Iterable[Mapping[str, Metric]]) -> Metrics:
    """Combine each metric over shards, in the order given."""
    out: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            out[name] = out[name] + metric if name in out else metric
    return out


def reward_metrics(rewards: npt.NDArray[Any]) -> Metrics:
    """`reward` and `reward_std` (divisor n) of rows [B]: what every reward role reports; nothing of no rows."""
    if not len(rewards):
        return {}
    return {
        "reward": Mean(float(rewards.sum(dtype=np.float64)), float(len(rewards))),
        "reward_std": Spread.of(rewards),
    }
