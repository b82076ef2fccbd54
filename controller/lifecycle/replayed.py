"""What a replayed node wrote, beside what the run kept of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch, Column

NOT_COMPARED = ("_s", "_bytes", "_per_s")
"""Ends of metrics that measure the machine."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A column or metric beside what the run kept."""

    name: str
    about: str
    """Of what was replayed."""
    equal: bool | None
    """To the last bit; None: there is nothing to compare with."""
    apart: str = ""
    """How far off."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Replayed:
    """A node that ran again."""

    node: str
    step: int
    line: str
    weights: str
    rows: int
    failure: str
    """Why it failed in the run; empty where it did not."""
    outputs: Batch
    recorded: Batch | None
    metrics: Mapping[str, float]
    recorded_metrics: Mapping[str, Any]

    def columns(self) -> Iterator[Difference]:
        """Each column that was written."""
        for name, column in self.outputs.items():
            kept = self.recorded[name] if self.recorded is not None and name in self.recorded else None
            equal, apart = (None, "") if kept is None else compared(column, kept)
            yield Difference(name=name, about=summary(column), equal=equal, apart=apart)

    def numbers(self) -> Iterator[Difference]:
        """Each metric, but those of the machine."""
        for name, value in self.metrics.items():
            if name.endswith(NOT_COMPARED) or "_bytes_" in name:
                continue
            kept = self.recorded_metrics.get(name)
            apart = "" if kept is None or kept == value else f"{value - kept:+.3g} from {kept:.6g}"
            yield Difference(
                name=name, about=f"{value:.6g}", equal=None if kept is None else kept == value, apart=apart
            )

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        said = {"node": self.node, "step": self.step, "line": self.line, "weights": self.weights, "rows": self.rows}
        return {
            **said,
            "failed": self.failure or None,
            "columns": {one.name: _plain(one) for one in self.columns()},
            "metrics": {one.name: _plain(one) for one in self.numbers()},
        }


def summary(column: Column) -> str:
    """Kind, size and spread of a column's entries."""
    if column.text:
        return f"text, {len(column)} rows"
    values = column.values
    size = f"{values.dtype} {list(values.shape)}"
    if not values.size or values.dtype == np.bool_:
        return f"{size}, {len(column)} rows"
    finite = np.isfinite(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
    bad = f", {int((~finite).sum())} not finite" if not finite.all() else ""
    real = values[finite].astype(np.float64)
    spread = f", from {real.min():.6g} to {real.max():.6g}, mean {real.mean():.6g}" if real.size else ""
    return f"{size}, {len(column)} rows{spread}{bad}"


def compared(column: Column, kept: Column) -> tuple[bool, str]:
    """Whether two columns are equal to the last bit, and how far off where not."""
    if len(column) != len(kept):
        return False, f"{len(column)} rows for {len(kept)}"
    if not np.array_equal(column.lengths, kept.lengths):
        differ = int((column.lengths != kept.lengths).sum())
        return False, f"{differ} of {len(column)} rows have another length"
    one, other = column.values, kept.values
    if one.dtype != other.dtype or one.shape != other.shape:
        return False, f"{one.dtype} {list(one.shape)} for {other.dtype} {list(other.shape)}"
    if one.tobytes() == other.tobytes():
        return True, ""
    unlike = one != other
    if one.dtype.kind == "f":
        unlike &= ~(np.isnan(one) & np.isnan(other))
        off = np.abs(one.astype(np.float64) - other.astype(np.float64))
        most = (
            f"at most {np.nanmax(np.where(unlike, off, 0.0)):.3g} off, " if unlike.any() else "signs of zero or NaN, "
        )
        return False, f"{most}{int(unlike.sum())} of {one.size} numbers"
    return False, f"{int(unlike.sum())} of {one.size} entries differ"


def _plain(one: Difference) -> dict[str, Any]:
    return {"about": one.about, "equal": one.equal, "apart": one.apart or None}
