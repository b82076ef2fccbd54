"""Plain policy gradient (REINFORCE, Williams 1992): L_t = -w_t A_t log pi(y_t); w_t = 1 for on-policy rows.

For RLOO and ReMax, where the whole response is one action, average over rows with row_divisor=1: the
row's loss is -A log pi(y) with log pi(y) the sum over its tokens (Ahmadian et al. 2024, 2402.14740, eq. 6).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.algorithms.loss import Settings, loss
from rlhf_dist.algorithms.losses.advantage_clip import check_advantage_clip, clipped_advantages
from rlhf_dist.algorithms.losses.average import TokenAverage, averaged, check_average
from rlhf_dist.algorithms.losses.correction import Correction, check_correction, corrected
from rlhf_dist.algorithms.outputs import Output

if TYPE_CHECKING:
    from torch import Tensor


def _outputs(settings: Settings) -> tuple[Output, ...]:
    return ("log_probs", "entropy") if settings["entropy_coef"] else ("log_probs",)


def _check(advantage_clip: float, correction: Correction, correction_cap: float, **others: Any) -> None:
    check_average(others["average"], others["row_divisor"])
    check_correction(correction, correction_cap)
    check_advantage_clip(advantage_clip)


@loss(
    reads=lambda settings: ("advantages", *(("rollout_log_probs",) if settings["correction"] != "none" else ())),
    outputs=_outputs,
    average=lambda settings: settings["average"],
    check=_check,
)
def policy_gradient(
    model: ModelOutput,
    rows: Rows,
    *,
    entropy_coef: float = 0.0,
    advantage_clip: float = 0.0,
    average: TokenAverage = "tokens",
    row_divisor: float = 0.0,
    correction: Correction = "none",
    correction_cap: float = 2.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_gradient(average="rows", row_divisor=1)` is REINFORCE over whole responses. Reads advantages [T], and
    rollout_log_probs [T] with a correction.

    entropy_coef      weight of the entropy bonus; 0 for none
    advantage_clip    advantages are cut to +-this; 0 for no bound
    average           tokens, rows, rows_with_tokens or groups (see average.py)
    row_divisor       with an average over rows: a constant to divide each row's sum by; 0 for the row's token count
    correction        weight of a token by how likely the current policy would have sampled it (see correction.py)
    correction_cap    largest such weight, >= 1
    """
    log_probs = model.log_probs
    assert log_probs is not None
    value = -clipped_advantages(rows["advantages"], advantage_clip) * log_probs
    off_policy: dict[str, Tensor] = {}
    if correction != "none":
        value, off_policy = corrected(value, log_probs, rows, correction, correction_cap)
    metrics = {"policy_loss": value, "log_prob": log_probs, **off_policy}
    if entropy_coef:
        assert model.entropy is not None
        value = value - entropy_coef * model.entropy
        metrics["entropy"] = model.entropy
    means = {name: averaged(metric.detach(), rows, average, 0.0) for name, metric in metrics.items()}
    return averaged(value, rows, average, row_divisor), means
