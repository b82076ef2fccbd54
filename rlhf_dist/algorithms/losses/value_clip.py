"""The critic's loss in PPO, with the value clip of OpenAI's baselines (Huang et al. 2022, "37 details", 9).

v'  = v_old + clip(v - v_old, -clip, clip)
L_t = coef * max((v_t - R_t)^2, (v'_t - R_t)^2)                 coef 1/2
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.algorithms.loss import loss
from rlhf_dist.algorithms.losses.average import TokenAverage, averaged, check_average

if TYPE_CHECKING:
    from torch import Tensor


def _check(clip: float, coef: float, average: str) -> None:
    if clip < 0:
        raise ValueError(f"the value clip must be > 0 reward units, or 0 for none, got {clip}")
    if coef <= 0:
        raise ValueError(f"the value loss's coef must be > 0, got {coef}")
    check_average(average)


@loss(
    reads=lambda settings: ("returns", "values") if settings["clip"] else ("returns",),
    outputs=("values",),
    average=lambda settings: settings["average"],
    check=_check,
)
def value_clip(
    model: ModelOutput, rows: Rows, clip: float = 0.2, *, coef: float = 0.5, average: TokenAverage = "tokens"
) -> tuple[Tensor, dict[str, Tensor]]:
    """`value_clip(0)` is half the squared error. Reads returns [T], and the values [T] before the update with clip > 0.

    clip       how far a value may move from the one before the update, in reward units; 0 for no bound
    coef       factor of the squared error
    average    tokens, rows, rows_with_tokens or groups (see average.py)
    """
    values, returns = model.values, rows["returns"]
    assert values is not None
    squared_error = (values - returns) ** 2
    value_loss = coef * squared_error
    metrics = {"value": values, "value_error_squared": squared_error}
    if clip:
        old = rows["values"]
        clipped_error = (old + (values - old).clamp(-clip, clip) - returns) ** 2
        value_loss = coef * squared_error.maximum(clipped_error)
        metrics["value_clip_fraction"] = (clipped_error > squared_error).to(values.dtype)
    metrics["value_loss"] = value_loss
    means = {name: averaged(metric.detach(), rows, average, 0.0) for name, metric in metrics.items()}
    return averaged(value_loss, rows, average, 0.0), means
