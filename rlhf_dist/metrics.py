"""Metrics that add up: a mean is carried as (total, count), so shards and ranks combine exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


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


Metrics = dict[str, Mean]


def combine(parts: Iterable[Mapping[str, Mean]]) -> Metrics:
    """Sum each metric over shards, in the order given."""
    out: Metrics = {}
    for part in parts:
        for name, mean in part.items():
            out[name] = out[name] + mean if name in out else mean
    return out
