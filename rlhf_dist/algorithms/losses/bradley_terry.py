"""Reward model on pairs: L = -log sigma(r(chosen) - r(rejected) - m) + c (r(chosen) + r(rejected))^2.

Bradley-Terry likelihood (Ouyang et al. 2022, 2203.02155, eq. 1); the margin m of Llama 2 (2307.09288, eq. 2);
the centring term c of Eisenstein et al. 2023 (2312.09244). r is the score at the row's last token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.algorithms.loss import loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected, pair_metrics

if TYPE_CHECKING:
    from torch import Tensor


@loss(
    reads=lambda settings: ("label", "margin") if settings["use_margin"] else ("label",),
    outputs=("scores",),
    average="groups",
)
def bradley_terry(
    model: ModelOutput, rows: Rows, *, use_margin: bool = False, centre_coef: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """`bradley_terry()` is the plain pair likelihood. Reads label [B] (and margin [B] when used); averaged over pairs.

    use_margin     ask for a gap of at least `margin` between the two rewards
    centre_coef    weight of the term that keeps rewards around 0; 0 for none
    """
    from torch.nn.functional import logsigmoid

    assert model.scores is not None
    chosen, rejected = chosen_and_rejected(model.scores, rows)
    gap = chosen - rejected
    if use_margin:
        margin, _ = chosen_and_rejected(rows["margin"], rows)
        gap = gap - margin
    value = -logsigmoid(gap) + centre_coef * (chosen + rejected) ** 2
    return value, pair_metrics(value, chosen, rejected)
