"""The work of one step: how many prompts, samples and updates, and how long prompts and responses are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, log, sqrt
from statistics import NormalDist
from typing import Any

from rlhf_dist.typed import ConfigError, unknown

QUANTILES = 32
SPREAD = 0.5
"""Standard deviation of response lengths over their mean where only a mean and a limit are given."""


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths as equally likely values, tokens, ascending."""

    values: tuple[float, ...]

    @cached_property
    def mean(self) -> float:
        """Mean, tokens."""
        return sum(self.values) / len(self.values)

    @cached_property
    def mean_square(self) -> float:
        """Mean of the squares, tokens squared."""
        return sum(value * value for value in self.values) / len(self.values)

    @property
    def longest(self) -> float:
        """The longest, tokens."""
        return self.values[-1]

    @cached_property
    def alive(self) -> tuple[tuple[float, float, float], ...]:
        """(first token, tokens, share of rows still going) of each stretch in which no row finishes."""
        stretches: list[tuple[float, float, float]] = []
        before = 0.0
        for index, value in enumerate(self.values):
            if value > before:
                stretches.append((before, value - before, 1.0 - index / len(self.values)))
                before = value
        return tuple(stretches)

    @classmethod
    def fixed(cls, tokens: float) -> Lengths:
        """All the same."""
        return cls((float(tokens),))

    @classmethod
    def lognormal(cls, mean: float, longest: float, spread: float = SPREAD) -> Lengths:
        """Lognormal with this mean and relative standard deviation, cut at `longest`: how responses are distributed."""
        sigma = sqrt(log(1.0 + spread * spread))
        mu = log(mean) - sigma * sigma / 2.0
        normal = NormalDist(mu, sigma)
        raw = [exp(normal.inv_cdf((index + 0.5) / QUANTILES)) for index in range(QUANTILES)]
        return cls(tuple(min(max(value, 1.0), longest) for value in raw))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One step."""

    prompts: int
    """Prompts of a step (rows, for examples and preferences)."""
    samples_per_prompt: int = 1
    prompt: Lengths
    response: Lengths
    mini_batches: int = 1
    """Optimizer steps in one pass over the batch."""
    epochs: int = 1

    @property
    def rows(self) -> int:
        """Responses of a step."""
        return self.prompts * self.samples_per_prompt

    @cached_property
    def longest(self) -> float:
        """Longest row, tokens."""
        return self.prompt.longest + self.response.longest

    @cached_property
    def row_tokens(self) -> float:
        """Mean length of a row, prompt and response, tokens."""
        return self.prompt.mean + self.response.mean

    @cached_property
    def row_squares(self) -> float:
        """Mean of the squared length of a row; prompts and responses taken as independent."""
        return self.prompt.mean_square + 2.0 * self.prompt.mean * self.response.mean + self.response.mean_square

    @property
    def tokens(self) -> float:
        """Prompt and response tokens of a step."""
        return self.rows * self.row_tokens


KEYS = ("prompts", "samples_per_prompt", "prompt_tokens", "response_tokens", "mini_batches", "epochs")


def parse_workload(value: Any, key: str = "workload") -> Workload:
    """A workload from the mapping in a case file. Raises ConfigError for what is missing or cannot be."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} must be a mapping with {', '.join(KEYS)}, got {value!r}")
    for name in value:
        if name not in KEYS:
            raise ConfigError(f"{key}: {unknown(str(name), KEYS, 'key')}")
    for name in ("prompts", "prompt_tokens", "response_tokens"):
        if value.get(name) is None:
            raise ConfigError(f"{key}.{name} has no value and needs one; set {key}.{name}")
    counts = {
        name: _count(value.get(name, 1), f"{key}.{name}") for name in ("prompts", "samples_per_prompt", *KEYS[4:])
    }
    return Workload(
        prompt=parse_lengths(value["prompt_tokens"], f"{key}.prompt_tokens"),
        response=parse_lengths(value["response_tokens"], f"{key}.response_tokens"),
        **counts,
    )


def parse_lengths(value: Any, key: str) -> Lengths:
    """Lengths from a number (all the same), {mean, max, spread}, or a list of observed lengths.

    Raises ConfigError for anything else.
    """
    if isinstance(value, Mapping):
        for name in value:
            if name not in ("mean", "max", "spread"):
                raise ConfigError(f"{key}: {unknown(str(name), ('mean', 'max', 'spread'), 'key')}")
        if "mean" not in value:
            if "max" not in value:
                raise ConfigError(f"{key} needs a mean, such as {{mean: 800, max: 2048}}, got {dict(value)!r}")
            return Lengths.fixed(_positive(value["max"], f"{key}.max"))
        mean = _positive(value["mean"], f"{key}.mean")
        longest = _positive(value.get("max", 4.0 * mean), f"{key}.max")
        if mean > longest:
            raise ConfigError(f"{key}.mean = {mean:g} is above {key}.max = {longest:g}; swap them")
        spread = _positive(value.get("spread", SPREAD), f"{key}.spread")
        return Lengths.fixed(mean) if mean == longest else Lengths.lognormal(mean, longest, spread)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ConfigError(f"{key} is an empty list; give a number or observed lengths")
        observed = sorted(_positive(one, key) for one in value)
        if len(observed) > QUANTILES:
            at = [(index + 0.5) / QUANTILES * len(observed) for index in range(QUANTILES - 1)]
            observed = [observed[int(position)] for position in at] + [observed[-1]]
        return Lengths(tuple(observed))
    return Lengths.fixed(_positive(value, key))


def _positive(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"{key} must be a number of tokens above 0, {{mean, max}} or a list, got {value!r}")
    return float(value)


def _count(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 1:
        raise ConfigError(f"{key} must be a whole number of at least 1, got {value!r}")
    return int(value)
