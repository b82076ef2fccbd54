"""Importance correction: rows sampled by an older policy, or by an engine that computes a little differently.

    rho_t = pi_old(y_t) / pi_rollout(y_t)      pi_rollout as sampled, pi_old as recomputed before this step's update

    none       w_t = 1
    token      w_t = min(rho_t, cap)                          truncated importance sampling, per token
                                                              (Ionides 2008; IMPALA, 1802.01561, eq. 1, its rho bar)
    sequence   w_t = min(prod over the row of rho, cap)       the same for the whole response: unbiased but for the cap
    masked     w_t = rho_t if 1/cap <= rho_t <= cap else 0    tokens that are too far off are left out
    geometric  w_t = 1 if 1/cap <= (geometric mean of rho over the row) <= cap else 0
                                                              responses that are; a cap near 1, such as 1.01

The policy's loss is multiplied by w_t, which carries no gradient: with PPO's clipped ratio to pi_old that is
decoupled PPO (Hilton et al. 2022, 2110.00641, eq. 7; used asynchronously by AReaL, 2505.24298, eq. 5).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from rlhf_dist.algorithms.contract import Rows
from rlhf_dist.algorithms.kl import LOG_RATIO_LIMIT, named_kl

if TYPE_CHECKING:
    from torch import Tensor

Correction = Literal["none", "token", "sequence", "masked", "geometric"]
CORRECTIONS: tuple[str, ...] = ("none", "token", "sequence", "masked", "geometric")


def check_correction(correction: str, cap: float) -> None:
    """Raises ValueError for a correction that is not known or a cap that would cut everything."""
    if correction not in CORRECTIONS:
        raise ValueError(f"correction must be one of {', '.join(CORRECTIONS)}, got {correction!r}")
    if cap < 1:
        raise ValueError(f"correction_cap must be at least 1 (1 leaves on-policy rows as they are), got {cap}")


def importance_weight(log_rho: Tensor, rows: Rows, correction: Correction, cap: float) -> Tensor:
    """[T] w_t for log rho [T]; see the module."""
    if correction == "none":
        return log_rho.new_ones(log_rho.shape)
    if correction == "geometric":
        mean = rows.mean_tokens(log_rho)[rows.row_of_token]
        return (mean.abs() <= math.log(cap)).to(log_rho.dtype)
    if correction == "sequence":
        log_rho = rows.sum_tokens(log_rho)[rows.row_of_token]
    rho = log_rho.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if correction == "masked":
        return rho * ((rho <= cap) & (rho >= 1 / cap))
    return rho.clamp(max=cap)


def corrected(
    policy_loss: Tensor, old_log_probs: Tensor, rows: Rows, correction: Correction, cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """w_t times the policy's loss [T], and what to report of rho and w, [T] each. Reads rollout_log_probs."""
    # Tokens that do not count may hold anything: 0 keeps them from overflowing before they are masked.
    log_rho = (old_log_probs.detach() - rows["rollout_log_probs"]).masked_fill(rows.mask == 0, 0.0)
    rho = log_rho.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    report = {
        "rollout_mismatch": log_rho.abs(),
        "rollout_ratio": rho,
        "rollout_ratio_error": (rho - 1).abs(),
        **named_kl("rollout_kl", log_rho.new_zeros(()), log_rho),
    }
    if correction == "none":
        return policy_loss, report
    weight = importance_weight(log_rho, rows, correction, cap)
    return weight * policy_loss, {**report, "correction": weight}
