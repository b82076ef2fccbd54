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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_dist.algorithms.contract import Average, ModelOutput, Output, Rows
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class _PairLoss:
    """What the three share: one number per pair, from log-probs and labels."""

    @property
    def reads(self) -> tuple[str, ...]:
        return ("label", "ref_log_probs")

    @property
    def outputs(self) -> tuple[Output, ...]:
        return ("log_probs",)

    @property
    def average(self) -> Average:
        return "groups"


@dataclass(frozen=True, kw_only=True)
class Dpo(_PairLoss):
    """Reads ref_log_probs [T] and label [B]; averaged over pairs."""

    beta: float = 0.1
    """Strength of the pull to the reference."""
    label_smoothing: float = 0.0
    """Share of labels believed to be flipped, in [0, 0.5)."""
    smoothing: Literal["conservative", "robust"] = "conservative"
    """What is done about them: cDPO, or the unbiased loss of robust DPO (which is not bounded from below)."""
    length_normalised: bool = False
    """Mean instead of sum over the response's tokens (Tulu 3, 2411.15124)."""

    def __post_init__(self) -> None:
        _check_positive("beta", self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.smoothing not in ("conservative", "robust"):
            raise ValueError(f"smoothing must be 'conservative' or 'robust', got {self.smoothing!r}")

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        from torch.nn.functional import logsigmoid

        per_row = _log_ratio(model, rows, self.length_normalised)
        chosen, rejected = chosen_and_rejected(self.beta * per_row, rows)
        margin, flipped = chosen - rejected, self.label_smoothing
        if self.smoothing == "robust":
            loss = (flipped * logsigmoid(-margin) - (1 - flipped) * logsigmoid(margin)) / (1 - 2 * flipped)
        else:
            loss = -(1 - flipped) * logsigmoid(margin) - flipped * logsigmoid(-margin)
        return loss, _metrics(loss, chosen, rejected)


@dataclass(frozen=True, kw_only=True)
class Ipo(_PairLoss):
    """Reads ref_log_probs [T] and label [B]; averaged over pairs."""

    tau: float = 0.1
    """Strength of the pull to the reference: the log-ratios are drawn 1 / (2 tau) apart."""
    length_normalised: bool = False
    """Mean instead of sum over the response's tokens."""

    def __post_init__(self) -> None:
        _check_positive("tau", self.tau)

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = chosen_and_rejected(_log_ratio(model, rows, self.length_normalised), rows)
        loss = (chosen - rejected - 1 / (2 * self.tau)) ** 2
        return loss, _metrics(loss, self.tau * chosen, self.tau * rejected)


@dataclass(frozen=True, kw_only=True)
class SimPo(_PairLoss):
    """Reads label [B]; averaged over pairs."""

    beta: float = 2.0
    """Scale of the length-normalised log-probs."""
    gamma: float = 1.0
    """Target margin."""

    def __post_init__(self) -> None:
        _check_positive("beta", self.beta)

    @property
    def reads(self) -> tuple[str, ...]:
        return ("label",)

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        from torch.nn.functional import logsigmoid

        assert model.log_probs is not None, "simpo asked for log_probs"
        chosen, rejected = chosen_and_rejected(self.beta * rows.mean_tokens(model.log_probs), rows)
        loss = -logsigmoid(chosen - rejected - self.gamma)
        return loss, _metrics(loss, chosen, rejected)


def dpo(
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
    smoothing: Literal["conservative", "robust"] = "conservative",
    length_normalised: bool = False,
) -> Dpo:
    """`dpo(0.1)`."""
    return Dpo(beta=beta, label_smoothing=label_smoothing, smoothing=smoothing, length_normalised=length_normalised)


def ipo(tau: float = 0.1, *, length_normalised: bool = False) -> Ipo:
    """`ipo(0.1)`."""
    return Ipo(tau=tau, length_normalised=length_normalised)


def simpo(beta: float = 2.0, gamma: float = 1.0) -> SimPo:
    """`simpo(2.0, 1.0)`."""
    return SimPo(beta=beta, gamma=gamma)


def _log_ratio(model: ModelOutput, rows: Rows, length_normalised: bool) -> Tensor:
    """[B] h(y); its mean over the response's tokens where it is length-normalised."""
    assert model.log_probs is not None, "the loss asked for log_probs"
    per_token = model.log_probs - rows["ref_log_probs"]
    return rows.mean_tokens(per_token) if length_normalised else rows.sum_tokens(per_token)


def _metrics(loss: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Of implicit rewards, [G] each."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "preference_loss": loss.detach(),
        "accuracy": (chosen > rejected).to(chosen.dtype),
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }


def _check_positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name} must be > 0, got {value}")
