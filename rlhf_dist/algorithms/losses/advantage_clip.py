"""A bound on advantages: what a rare reward in a group of small spread may weigh."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def clipped_advantages(advantages: Tensor, bound: float) -> Tensor:
    """[T] cut to [-bound, bound]; as they are for a bound of 0."""
    return advantages.clamp(-bound, bound) if bound else advantages


def check_advantage_clip(bound: float) -> None:
    """Raises ValueError for a negative bound."""
    if not bound >= 0:
        raise ValueError(f"advantage_clip must be > 0, or 0 for no bound, got {bound}")
