"""Negative log-likelihood of the response: supervised fine-tuning. L_t = -w log pi(y_t), w = 1 or the row's weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.algorithms.loss import loss
from rlhf_dist.algorithms.losses.average import TokenAverage, averaged, check_average

if TYPE_CHECKING:
    from torch import Tensor


@loss(
    reads=lambda settings: ("weight",) if settings["weighted"] else (),
    average=lambda settings: settings["average"],
    check=lambda weighted, average: check_average(average),
)
def nll(
    model: ModelOutput, rows: Rows, *, weighted: bool = False, average: TokenAverage = "tokens"
) -> tuple[Tensor, dict[str, Tensor]]:
    """`nll()` is the mean over all tokens of the batch. Reads nothing but the sequence, and weight [B] when weighted.

    weighted    multiply each row's loss by its `weight`; the count it is averaged over stays that of the tokens
    average     tokens, rows, rows_with_tokens or groups (see average.py)
    """
    assert model.log_probs is not None
    value = -model.log_probs
    metrics = {"nll": averaged(value.detach(), rows, average, 0.0)}
    if weighted:
        value = value * rows["weight"][rows.row_of_token]
    return averaged(value, rows, average, 0.0), metrics
