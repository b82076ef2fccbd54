"""Metrics as curves by topic, and the points that stand out of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Values = Sequence[float | None]
"""One number a step; None where the step has none, or none that is finite."""

TOPICS: tuple[tuple[str, str], ...] = (
    ("Held-out rows", r"^heldout/"),
    ("Time by node", r"^time_s/"),
    ("Device memory", r"(device|predicted|moved|object_store)_?bytes|bytes_per_s"),
    ("Policy: KL, ratio, clipping, entropy", r"kl(_k\d)?$|ratio|rollout_|clip_fraction$|entropy|staleness|continued$"),
    ("Critic", r"^critic/|/value|explained_variance$"),
    (
        "Rewards and advantages",
        r"reward|score/|/(cost|accuracy|advantage|return|win_rate|groups|zero_variance_groups)$",
    ),
    ("Responses", r"response|/(finished|rows|sequence_tokens)$"),
    ("Loss and optimizer", r"loss|grad_norm|/(lr|optimizer_steps|skipped_steps|version|tokens|padding_share)$"),
    ("Speed", r"^(step_s|tokens_per_s)$|seconds|bytes|parameters"),
    ("Data", r"^prompts/|prompts|epoch|too_long"),
)
"""The first that fits says where a metric is shown; the rest is under `Other`."""
OTHER = "Other"
ORDER = ("Rewards and advantages", "Held-out rows", "Policy: KL, ratio, clipping, entropy", "Responses", "Critic",
         "Loss and optimizer", "Speed", "Time by node", "Device memory", "Data", OTHER)  # fmt: skip
POINTS = 4000
"""Most points of a curve: more cannot be told apart on a screen. The largest and smallest of each stretch are kept."""

WINDOW = 30
"""Steps before a point that say what is usual there."""
LEAST = 10
"""With fewer of them nothing is called unusual."""
UNUSUAL = 8.0
"""Deviations from the median (median absolute deviation * 1.4826) at which a point is a spike; in noise from a normal
distribution one in 10^15 points is."""
SPIKES = 40
NO_SPIKES = re.compile(r"^time_s/|_s$|seconds|bytes|/(version|lr|tokens|rows|epoch|optimizer_steps)$|per_s")
"""Clocks and counters jump for reasons of their own."""


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A point far from what its metric was before."""

    metric: str
    step: int
    value: float
    usual: float
    """Median of the steps before."""
    deviations: float


def topic_of(metric: str) -> str:
    """Where it is shown."""
    return next((topic for topic, pattern in TOPICS if re.search(pattern, metric)), OTHER)


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Lines of metrics.jsonl as one list a metric, aligned with the lines."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("step", "kind")))
    return {name: [_number(row.get(name)) for row in rows] for name in names}


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def curve(steps: Sequence[int], values: Values) -> dict[str, Any]:
    """`y`, and `x` where it is not all steps: at most POINTS points, the extremes of each stretch among them."""
    if len(values) <= POINTS:
        return {"y": [None if value is None else short(value) for value in values]}
    kept = set[int]()
    for part in np.array_split(np.arange(len(values)), POINTS // 2):
        there = [int(at) for at in part if values[at] is not None]
        if there:
            kept |= {min(there, key=lambda at: values[at] or 0.0), max(there, key=lambda at: values[at] or 0.0)}
    order = sorted(kept)
    return {"x": [steps[at] for at in order], "y": [short(values[at] or 0.0) for at in order]}


def short(value: float) -> float:
    """Six digits: a screen shows no more, and a page is half as large."""
    return float(f"{value:.6g}")


def find_spikes(steps: Sequence[int], series: Mapping[str, Values]) -> list[Spike]:
    """The points that are most unusual, three of a metric at most, the most unusual first."""
    found: list[Spike] = []
    for name, values in series.items():
        if not NO_SPIKES.search(name):
            found += sorted(_spikes_of(name, steps, values), key=lambda one: -one.deviations)[:3]
    return sorted(found, key=lambda one: -one.deviations)[:SPIKES]


def _spikes_of(name: str, steps: Sequence[int], values: Values) -> list[Spike]:
    at = [k for k, value in enumerate(values) if value is not None]
    if len(at) <= LEAST:
        return []
    numbers = np.array([values[k] for k in at], dtype=np.float64)
    median, deviation = _before(numbers)
    # A metric that stood still so far has no scale of its own: a millionth of its size is the least.
    scale = np.maximum(1.4826 * deviation, 1e-6 * np.abs(median) + 1e-12)
    far = np.abs(numbers - median) / scale
    return [
        Spike(metric=name, step=steps[at[k]], value=float(numbers[k]), usual=float(median[k]), deviations=float(far[k]))
        for k in np.flatnonzero((far > UNUSUAL) & (deviation > 0))
    ]


def _before(numbers: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """[N] median and median absolute deviation of the WINDOW numbers before each; deviation 0 before LEAST of them."""
    padded = np.concatenate([np.full(WINDOW, np.nan), numbers[:-1]])
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)
    enough = np.arange(len(numbers)) >= LEAST
    median, deviation = np.zeros(len(numbers)), np.zeros(len(numbers))
    median[enough] = np.nanmedian(windows[enough], axis=1)
    deviation[enough] = np.nanmedian(np.abs(windows[enough] - median[enough, None]), axis=1)
    return median, deviation
