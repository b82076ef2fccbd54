"""Direct preference optimisation and two relatives, over labelled pairs.

h(y)  = log pi(y) - log pi_ref(y), summed over the response;   delta = h(chosen) - h(rejected)

dpo    -(1 - e) log sigma(beta delta) - e log sigma(-beta delta)
       Rafailov et al. 2023, 2305.18290, eq. 7; label smoothing e: Mitchell 2023, "cDPO"
robust (-(1 - e) log sigma(beta delta) + e log sigma(-beta delta)) / (1 - 2 e)
       Chowdhury et al. 2024, 2403.00409, eq. 12: unbiased where a share e of the labels is flipped
ipo    (delta - 1 / (2 tau))^2                             Azar et al. 2023, 2310.12036, eq. 17
simpo  -log sigma(beta (mean log pi(chosen) - mean log pi(rejected)) - gamma)
       Meng et al. 2024, 2405.14734, eq. 6: no reference
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.algorithms.loss import loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected, pair_metrics

if TYPE_CHECKING:
    from torch import Tensor


def _check_dpo(beta: float, label_smoothing: float, smoothing: str, **others: Any) -> None:
    _check_positive("beta", beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if smoothing not in ("conservative", "robust"):
        raise ValueError(f"smoothing must be 'conservative' or 'robust', got {smoothing!r}")


@loss(reads=("label", "ref_log_probs"), average="groups", check=_check_dpo)
def dpo(
    model: ModelOutput,
    rows: Rows,
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    smoothing: Literal["conservative", "robust"] = "conservative",
    length_normalised: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`dpo(0.1)`. Reads ref_log_probs [T] and label [B]; averaged over pairs.

    beta                 strength of the pull to the reference
    label_smoothing      share of labels believed to be flipped, in [0, 0.5)
    smoothing            what is done about them: cDPO, or the unbiased loss of robust DPO (not bounded from below)
    length_normalised    mean instead of sum over the response's tokens (Tulu 3, 2411.15124)
    """
    from torch.nn.functional import logsigmoid

    chosen, rejected = chosen_and_rejected(beta * _log_ratio(model, rows, length_normalised), rows)
    margin, flipped = chosen - rejected, label_smoothing
    if smoothing == "robust":
        value = (flipped * logsigmoid(-margin) - (1 - flipped) * logsigmoid(margin)) / (1 - 2 * flipped)
    else:
        value = -(1 - flipped) * logsigmoid(margin) - flipped * logsigmoid(-margin)
    return value, pair_metrics(value, chosen, rejected)


@loss(
    reads=("label", "ref_log_probs"),
    average="groups",
    check=lambda tau, length_normalised: _check_positive("tau", tau),
)
def ipo(
    model: ModelOutput, rows: Rows, tau: float = 0.1, *, length_normalised: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ipo(0.1)`. Reads ref_log_probs [T] and label [B]; averaged over pairs.

    tau                  strength of the pull to the reference: the log-ratios are drawn 1 / (2 tau) apart
    length_normalised    mean instead of sum over the response's tokens
    """
    chosen, rejected = chosen_and_rejected(_log_ratio(model, rows, length_normalised), rows)
    value = (chosen - rejected - 1 / (2 * tau)) ** 2
    return value, pair_metrics(value, tau * chosen, tau * rejected)


@loss(reads=("label",), average="groups", check=lambda beta, gamma: _check_positive("beta", beta))
def simpo(model: ModelOutput, rows: Rows, beta: float = 2.0, gamma: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """`simpo(2.0, 1.0)`. Reads label [B]; averaged over pairs.

    beta     scale of the length-normalised log-probs
    gamma    target margin
    """
    from torch.nn.functional import logsigmoid

    assert model.log_probs is not None
    chosen, rejected = chosen_and_rejected(beta * rows.mean_tokens(model.log_probs), rows)
    value = -logsigmoid(chosen - rejected - gamma)
    return value, pair_metrics(value, chosen, rejected)


def _log_ratio(model: ModelOutput, rows: Rows, length_normalised: bool) -> Tensor:
    """[B] h(y); its mean over the response's tokens where it is length-normalised."""
    assert model.log_probs is not None
    per_token = model.log_probs - rows["ref_log_probs"]
    return rows.mean_tokens(per_token) if length_normalised else rows.sum_tokens(per_token)


def _check_positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name} must be > 0, got {value}")
