"""Fields of a data file that a recipe's own kind of source names (`Prompts.fields`), as columns of their names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_dist.batch import Column
from rlhf_dist.data.fields import near
from rlhf_dist.data.files import RawRow


def own_column(name: str, what: str, rows: Sequence[tuple[str, RawRow]]) -> Column:
    """[B] the field `name` of every row (each with its place), as `what` says (`schema.FIELD_KINDS`).

    Raises ValueError naming the row that lacks it or has something else.
    """
    values = []
    for place, row in rows:
        if name not in row or (row[name] is None and what != "json"):
            raise ValueError(
                f"{place} has no {name!r}, which the recipe's kind of source names as {what}; it has "
                f"{', '.join(row) or 'no other fields'}{near(name, list(row))}"
            )
        values.append(_value(row[name], name, what, place))
    return Column.strings(values) if what in ("text", "json") else Column(np.array(values, dtype=what))


def _value(value: Any, name: str, what: str, place: str) -> Any:
    if what == "json":
        return json.dumps(value, default=str)
    if what == "text" and isinstance(value, str):
        return value
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if what == "int64" and whole and abs(value) < 1 << 63:
        return int(value)
    if what == "float32" and isinstance(value, int | float):
        return float(value)
    raise ValueError(f"{place}: {name!r} must be {what}, as the recipe's kind of source says, got {str(value)[:80]!r}")
