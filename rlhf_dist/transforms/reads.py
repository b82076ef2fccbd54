"""Columns that depend on an op's arguments: the reference is read only where a KL coefficient asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def with_kl(*always: str) -> Callable[[Mapping[str, Any]], tuple[str, ...]]:
    """`always`, and old_log_probs and ref_log_probs unless kl_coef is the number 0.

    A coefficient that is known only while the run goes (an adaptive one) counts as not 0.
    """

    def reads(arguments: Mapping[str, Any]) -> tuple[str, ...]:
        coef = arguments.get("kl_coef", 0.0)
        known_zero = isinstance(coef, int | float) and coef == 0
        return always if known_zero else (*always, "old_log_probs", "ref_log_probs")

    return reads
