"""Pairs: a group of two rows, one labelled +1 (chosen) and one -1 (rejected). Rows labelled 0 are left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_dist.algorithms.contract import Rows

if TYPE_CHECKING:
    from torch import Tensor


def chosen_and_rejected(per_row: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """[B] -> two of [G]: each group's entry at its chosen and at its rejected row.

    Raises ValueError if a group has not exactly one of each.
    """
    label = rows["label"]
    chosen, rejected = (label > 0).to(per_row.dtype), (label < 0).to(per_row.dtype)
    if not bool(((rows.sum_groups(chosen) == 1) & (rows.sum_groups(rejected) == 1)).all()):
        raise ValueError(
            "every group must have exactly one row labelled +1 and one labelled -1 for a loss over pairs; "
            f"got {int(chosen.sum())} and {int(rejected.sum())} in {rows.num_groups} groups"
        )
    return rows.sum_groups(per_row * chosen), rows.sum_groups(per_row * rejected)


def pair_metrics(value: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Of a loss over pairs, and of what its two sides are worth to the model, [G] each."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "preference_loss": value.detach(),
        "accuracy": (chosen > rejected).to(chosen.dtype),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }


def log_sigmoid(x: Tensor) -> Tensor:
    """log sigma(x), exact in both tails; for recipes, which do not import torch."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)
