"""Reward model on pairs: L = -log sigma(r(chosen) - r(rejected) - m) + c (r(chosen) + r(rejected))^2.

Bradley-Terry likelihood (Ouyang et al. 2022, 2203.02155, eq. 1); the margin m of Llama 2 (2307.09288, eq. 2);
the centring term c of Eisenstein et al. 2023 (2312.09244). r is the score at the row's last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_dist.algorithms.contract import Average, ModelOutput, Output, Rows
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BradleyTerry:
    """Reads label [B] (and margin [B] when used); averaged over pairs."""

    use_margin: bool = False
    """Ask for a gap of at least `margin` between the two rewards."""
    centre_coef: float = 0.0
    """Weight of the term that keeps rewards around 0; 0 for none."""

    @property
    def reads(self) -> tuple[str, ...]:
        return ("label", "margin") if self.use_margin else ("label",)

    @property
    def outputs(self) -> tuple[Output, ...]:
        return ("scores",)

    @property
    def average(self) -> Average:
        return "groups"

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        from torch.nn.functional import logsigmoid

        assert model.scores is not None, "bradley_terry asked for scores"
        chosen, rejected = chosen_and_rejected(model.scores, rows)
        gap = chosen - rejected
        if self.use_margin:
            margin, _ = chosen_and_rejected(rows["margin"], rows)
            gap = gap - margin
        loss = -logsigmoid(gap) + self.centre_coef * (chosen + rejected) ** 2
        return loss, {
            "preference_loss": loss.detach(),
            "accuracy": (chosen > rejected).to(gap.dtype).detach(),
            "margin": (chosen - rejected).detach(),
            "chosen_reward": chosen.detach(),
            "rejected_reward": rejected.detach(),
        }


def bradley_terry(*, use_margin: bool = False, centre_coef: float = 0.0) -> BradleyTerry:
    """`bradley_terry()` is the plain pair likelihood."""
    return BradleyTerry(use_margin=use_margin, centre_coef=centre_coef)
