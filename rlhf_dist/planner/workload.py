"""The work of one step: how many prompts, samples and updates, and how long prompts and responses are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from math import exp, inf, isfinite, log, sqrt
from statistics import NormalDist
from typing import Any

from rlhf_dist.typed import ConfigError, unknown

QUANTILES = 32
UNLIMITED = 4.0
"""Longest length over the mean, where no limit is given."""
TAIL = 24
"""The last quantile is halved so often: the longest of a million responses sets how long generation takes."""
SPREAD = 0.8
"""Standard deviation of response lengths over their mean where only a mean and a limit are given."""
ENDLESS = 0.001
"""Share of sampled responses that fall into repetition and end at the limit only. NeMo-RL published 287 s of generation
for 2,048 responses of 749 tokens on average and 16,384 at most (70B): the steps of the limit, not of the mean."""


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths: values in tokens, ascending, each with its share of the rows."""

    values: tuple[float, ...]
    shares: tuple[float, ...] = ()
    """Add up to 1; none given: all the same."""

    def __post_init__(self) -> None:
        if not self.shares:
            object.__setattr__(self, "shares", (1.0 / len(self.values),) * len(self.values))

    @cached_property
    def mean(self) -> float:
        """Mean, tokens."""
        return sum(value * share for value, share in zip(self.values, self.shares, strict=True))

    @cached_property
    def mean_square(self) -> float:
        """Mean of the squares, tokens squared."""
        return sum(value * value * share for value, share in zip(self.values, self.shares, strict=True))

    @property
    def longest(self) -> float:
        """The longest there is, tokens: what memory must be able to hold."""
        return self.values[-1]

    def alive(self, rows: int) -> tuple[tuple[float, float, float], ...]:
        """(tokens behind, steps, share of rows still going) of each stretch in which none of `rows` rows finishes.

        Tokens behind a row are those in the middle of the stretch. Steps are expected ones: a length that few rows
        have may not occur among so many, with F the share of shorter rows it occurs with probability 1 - F^rows. They
        add up to the expected longest of `rows` rows, and steps times shares to the mean.
        """
        return _alive(self, rows)

    def expected_longest(self, rows: int) -> float:
        """Mean length of the longest of `rows` rows, tokens."""
        return sum(steps for _, steps, _ in self.alive(rows))

    @classmethod
    def fixed(cls, tokens: float) -> Lengths:
        """All the same."""
        return cls((float(tokens),))

    @classmethod
    def lognormal(cls, mean: float, longest: float, spread: float = SPREAD, endless: float = ENDLESS) -> Lengths:
        """Lognormal, cut at `longest`: how responses are distributed.

        `mean` is that of all after the cut; `spread` the standard deviation over the mean before it; `endless` the
        share of rows that reach the limit whatever the distribution says.
        """
        sigma = sqrt(log(1.0 + spread * spread))
        endless = min(endless, 0.1 * mean / longest)  # So few that the mean is still that of the others.
        even = [1.0 / QUANTILES] * (QUANTILES - 1)
        tail = [2.0**-power / QUANTILES for power in range(1, TAIL)]
        cells = [*even, *tail, tail[-1]]
        scores = [NormalDist().inv_cdf(end - cell / 2.0) for end, cell in zip(accumulate(cells), cells, strict=True)]
        shares = [*((1.0 - endless) * cell for cell in cells), endless]

        def cut(mu: float) -> list[float]:
            return [*(min(max(exp(min(mu + sigma * score, 700.0)), 1.0), longest) for score in scores), longest]

        low, high = 0.0, log(longest) + 8.0 * sigma
        for _ in range(60):
            middle = (low + high) / 2.0
            short = sum(value * share for value, share in zip(cut(middle), shares, strict=True)) < mean
            low, high = (middle, high) if short else (low, middle)
        together: dict[float, float] = {}
        for value, share in zip(cut(high), shares, strict=True):
            together[value] = together.get(value, 0.0) + share
        return cls(tuple(together), tuple(together.values()))


@cache
def _alive(lengths: Lengths, rows: int) -> tuple[tuple[float, float, float], ...]:
    stretches: list[tuple[float, float, float]] = []
    before = shorter = 0.0
    for value, share in zip(lengths.values, lengths.shares, strict=True):
        occurs = 1.0 - min(shorter, 1.0) ** rows
        if value > before and occurs > 0.0:
            stretches.append(((before + value) / 2.0, (value - before) * occurs, (1.0 - shorter) / occurs))
            before = value
        shorter += share
    return tuple(stretches)


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
    rows = counts["prompts"] * counts["samples_per_prompt"]
    if counts["mini_batches"] > rows:
        raise ConfigError(f"{key}.mini_batches = {counts['mini_batches']} is more than the {rows} rows of a step")
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
        longest = _positive(value.get("max", UNLIMITED * mean), f"{key}.max")
        if mean > longest:
            raise ConfigError(f"{key}.mean = {mean:g} is above {key}.max = {longest:g}; swap them")
        spread = _positive(value.get("spread", SPREAD), f"{key}.spread")
        if mean == longest:
            return Lengths.fixed(mean)
        return Lengths.lognormal(mean, longest, spread, ENDLESS if "max" in value else 0.0)
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
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < inf:
        raise ConfigError(f"{key} must be a number of tokens above 0, {{mean, max}} or a list, got {value!r}")
    return float(value)


def _count(value: Any, key: str) -> int:
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and value == int(value)
    if not whole or value < 1:
        raise ConfigError(f"{key} must be a whole number of at least 1, got {value!r}")
    return int(value)
