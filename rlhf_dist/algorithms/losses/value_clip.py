"""The critic's loss in PPO, with the value clip of OpenAI's baselines (Huang et al. 2022, "37 details", 9).

v'  = v_old + clip(v - v_old, -clip, clip)
L_t = coef * max((v_t - R_t)^2, (v'_t - R_t)^2)                 coef 1/2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_dist.algorithms.contract import ModelOutput, Output, Rows
from rlhf_dist.algorithms.losses.average import TokenAverage, averaged, check_average

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ValueClip:
    """Reads returns [T] (and the values [T] before the update, with clip > 0)."""

    clip: float = 0.2
    """How far a value may move from the one before the update, in reward units; 0 for no bound."""
    coef: float = 0.5
    """Factor of the squared error."""
    average: TokenAverage = "tokens"
    """tokens, rows, rows_with_tokens or groups (see average.py)."""

    def __post_init__(self) -> None:
        if self.clip < 0:
            raise ValueError(f"the value clip must be > 0 reward units, or 0 for none, got {self.clip}")
        if self.coef <= 0:
            raise ValueError(f"the value loss's coef must be > 0, got {self.coef}")
        check_average(self.average)

    @property
    def reads(self) -> tuple[str, ...]:
        return ("returns", "values") if self.clip else ("returns",)

    @property
    def outputs(self) -> tuple[Output, ...]:
        return ("values",)

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        assert model.values is not None, "value_clip asked for values"
        values, returns = model.values, rows["returns"]
        squared_error = (values - returns) ** 2
        loss = self.coef * squared_error
        metrics = {"value": values, "value_error_squared": squared_error}
        if self.clip:
            old = rows["values"]
            clipped_error = (old + (values - old).clamp(-self.clip, self.clip) - returns) ** 2
            loss = self.coef * squared_error.maximum(clipped_error)
            metrics["value_clip_fraction"] = (clipped_error > squared_error).to(values.dtype)
        metrics["value_loss"] = loss
        means = {name: averaged(value.detach(), rows, self.average, 0.0) for name, value in metrics.items()}
        return averaged(loss, rows, self.average, 0.0), means


def value_clip(clip: float = 0.2, *, coef: float = 0.5, average: TokenAverage = "tokens") -> ValueClip:
    """`value_clip(0)` is half the squared error."""
    return ValueClip(clip=clip, coef=coef, average=average)
