"""Negative log-likelihood of the response: supervised fine-tuning. L_t = -w log pi(y_t), w = 1 or the row's weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_dist.algorithms.contract import ModelOutput, Output, Rows
from rlhf_dist.algorithms.losses.average import TokenAverage, averaged, check_average

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Nll:
    """Reads nothing but the sequence (and weight [B] when weighted)."""

    weighted: bool = False
    """Multiply each row's loss by its `weight`; the count it is averaged over stays that of the tokens."""
    average: TokenAverage = "tokens"
    """tokens, rows, rows_with_tokens or groups (see average.py)."""

    def __post_init__(self) -> None:
        check_average(self.average)

    @property
    def reads(self) -> tuple[str, ...]:
        return ("weight",) if self.weighted else ()

    @property
    def outputs(self) -> tuple[Output, ...]:
        return ("log_probs",)

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        assert model.log_probs is not None, "nll asked for log_probs"
        loss = -model.log_probs
        metrics = {"nll": averaged(loss.detach(), rows, self.average, 0.0)}
        if self.weighted:
            loss = loss * rows["weight"][rows.row_of_token]
        return averaged(loss, rows, self.average, 0.0), metrics


def nll(*, weighted: bool = False, average: TokenAverage = "tokens") -> Nll:
    """`nll()` is the mean over all tokens of the batch."""
    return Nll(weighted=weighted, average=average)
