"""What a replayed node wrote, beside what the run kept of it.

A run with one rank gives the same bits again. Where several ranks had the rows, or parts of the model, the same sums
are made in another order, so floats are compared to rounding too: `ROUNDING` of the largest number of the column. That
is many times the dtype's own step, since what a layer rounds the next ones multiply, and far below what a wrong row,
weight or setting does. Tokens, texts and whole numbers have no rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.compose import Launch
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.role_kinds import generation_of

ROUNDING = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Dtype that a model computes in -> how far two orders of the same sums may be apart, of the largest number."""
SMALL = 0.01
"""Metrics are compared as if they were at least so large: means of what cancels (KL, entropy of sure tokens)."""
NOT_COMPARED = ("_s", "_bytes", "_per_s", "/padding_share")
"""Ends of metrics that measure the machine, or how rows lie on its ranks."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A column or metric beside what the run kept."""

    name: str
    about: str
    """Of what was replayed."""
    equal: bool | None
    """To the last bit; None: there is nothing to compare with."""
    rounded: bool = False
    """Not equal, and no further off than rounding is."""
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
    of_rows: int | None
    """Of the whole batch; None: not known."""
    parts: int
    """Calls of the run whose rows these are."""
    rounding: float
    """See `ROUNDING`; 0: no model is computed with."""
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
            rounded = equal is False and kept is not None and _rounded(column, kept, self.rounding)
            yield Difference(name=name, about=summary(column), equal=equal, rounded=rounded, apart=apart)

    def numbers(self) -> Iterator[Difference]:
        """Each metric, but those of the machine."""
        for name, value in self.metrics.items():
            if name.endswith(NOT_COMPARED) or "_bytes_" in name:
                continue
            kept = self.recorded_metrics.get(name)
            about = f"{value:.6g}"
            if kept is None:
                yield Difference(name=name, about=about, equal=None, rounded=False, apart="")
                continue
            equal = kept == value or bool(np.isnan(kept) and np.isnan(value))
            apart = "" if equal else f"{value - kept:+.3g} from {kept:.6g}"
            rounded = not equal and abs(value - kept) <= self.rounding * max(abs(kept), SMALL)
            yield Difference(name=name, about=about, equal=equal, rounded=rounded, apart=apart)

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        said = {"node": self.node, "step": self.step, "line": self.line, "weights": self.weights, "rows": self.rows}
        return {
            **said,
            "of_rows": self.of_rows,
            "parts": self.parts,
            "rounding": self.rounding,
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


def rounding_of(dtypes: Iterable[str]) -> float:
    """The largest of these dtypes; 0 without any."""
    return max((ROUNDING[dtype] for dtype in dtypes), default=0.0)


def dtypes_of(launch: Launch, node: Node) -> set[str]:
    """Dtypes that the model of the node's role computes in; none for host ops, states, sources and functions."""
    config = launch.roles.get(node.role)
    if config is None or config.model is None:
        return set()
    rollout = generation_of(launch, node.role)
    return {config.engine.dtype} if rollout is None else {config.engine.dtype, rollout.dtype}


def _rounded(column: Column, kept: Column, rounding: float) -> bool:
    one, other = column.values, kept.values
    if column.text or one.dtype.kind != "f" or not np.array_equal(column.lengths, kept.lengths):
        return False
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    largest = np.abs(other[np.isfinite(other)]).max(initial=0.0)
    return bool(np.allclose(one, other, rtol=0.0, atol=rounding * float(largest), equal_nan=True))


def _plain(one: Difference) -> dict[str, Any]:
    return {"about": one.about, "equal": one.equal, "rounded": one.rounded, "apart": one.apart or None}
