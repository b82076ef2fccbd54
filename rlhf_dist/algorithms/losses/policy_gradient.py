"""Plain policy gradient (REINFORCE, Williams 1992): L_t = -w_t A_t log pi(y_t); w_t = 1 for on-policy rows.

For RLOO and ReMax, where the whole response is one action, average over rows with row_divisor=1: the
row's loss is -A log pi(y) with log pi(y) the sum over its tokens (Ahmadian et al. 2024, 2402.14740, eq. 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_dist.algorithms.contract import ModelOutput, Output, Rows
from rlhf_dist.algorithms.losses.advantage_clip import check_advantage_clip, clipped_advantages
from rlhf_dist.algorithms.losses.average import TokenAverage, averaged, check_average
from rlhf_dist.algorithms.losses.correction import Correction, check_correction, corrected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """Reads advantages [T], and rollout_log_probs [T] with a correction."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 for none."""
    advantage_clip: float = 0.0
    """Advantages are cut to +-this; 0 for no bound."""
    average: TokenAverage = "tokens"
    """tokens, rows, rows_with_tokens or groups (see average.py)."""
    row_divisor: float = 0.0
    """With an average over rows: a constant to divide each row's sum by; 0 for the row's own token count."""
    correction: Correction = "none"
    """Weight of a token by how likely the current policy would have sampled it (see correction.py)."""
    correction_cap: float = 2.0
    """Largest such weight, >= 1."""

    def __post_init__(self) -> None:
        check_average(self.average, self.row_divisor)
        check_correction(self.correction, self.correction_cap)
        check_advantage_clip(self.advantage_clip)

    @property
    def reads(self) -> tuple[str, ...]:
        return ("advantages",) if self.correction == "none" else ("advantages", "rollout_log_probs")

    @property
    def outputs(self) -> tuple[Output, ...]:
        return ("log_probs", "entropy") if self.entropy_coef else ("log_probs",)

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        assert model.log_probs is not None, "policy_gradient asked for log_probs"
        loss = -clipped_advantages(rows["advantages"], self.advantage_clip) * model.log_probs
        off_policy: dict[str, Tensor] = {}
        if self.correction != "none":
            loss, off_policy = corrected(loss, model.log_probs, rows, self.correction, self.correction_cap)
        metrics = {"policy_loss": loss, "log_prob": model.log_probs, **off_policy}
        if self.entropy_coef:
            assert model.entropy is not None, "policy_gradient asked for entropy"
            loss = loss - self.entropy_coef * model.entropy
            metrics["entropy"] = model.entropy
        means = {name: averaged(value.detach(), rows, self.average, 0.0) for name, value in metrics.items()}
        return averaged(loss, rows, self.average, self.row_divisor), means


def policy_gradient(
    *,
    entropy_coef: float = 0.0,
    advantage_clip: float = 0.0,
    average: TokenAverage = "tokens",
    row_divisor: float = 0.0,
    correction: Correction = "none",
    correction_cap: float = 2.0,
) -> PolicyGradient:
    """`policy_gradient(average="rows", row_divisor=1)` is REINFORCE over whole responses."""
    return PolicyGradient(
        entropy_coef=entropy_coef,
        advantage_clip=advantage_clip,
        average=average,
        row_divisor=row_divisor,
        correction=correction,
        correction_cap=correction_cap,
    )
