"""Lagrange multiplier of a cost constraint, as in Safe RLHF (Dai et al. 2023, arXiv 2310.12773).

    maximise  E[reward]   subject to   E[cost] <= limit

The multiplier is kept as its logarithm, between two bounds, so it stays positive whatever the step size.
"""

from __future__ import annotations

import math

import numpy as np

from rlhf_dist.algorithms.ragged import FloatArray


def updated_log_multiplier(
    log_multiplier: float,
    mean_cost: float,
    *,
    limit: float,
    lr: float,
    largest: float = 10.0,
    smallest: float = 1e-30,
) -> float:
    """ln lambda + lr * lambda * (mean_cost - limit), kept in [ln(smallest), ln(largest)]; eq. 31 of the paper with
    J_C = cost - limit.

    Grows while the mean cost is over the limit, shrinks while it is under; `smallest` keeps one huge step from making
    a multiplier that is 0 as a float. Raises ValueError if mean_cost is not finite, or not 0 < smallest <= largest.
    """
    if not math.isfinite(mean_cost):
        raise ValueError(f"the mean cost must be a finite number, got {mean_cost}; look at the cost model's scores")
    if not 0 < smallest <= largest:
        raise ValueError(f"multipliers must be in [smallest, largest], 0 < smallest, got [{smallest}, {largest}]")
    step = lr * math.exp(log_multiplier) * (mean_cost - limit)
    return max(min(log_multiplier + step, math.log(largest)), math.log(smallest))


def combined_advantages(advantages: FloatArray, cost_advantages: FloatArray, multiplier: float) -> FloatArray:
    """(A_r - lambda A_c) / (1 + lambda): the paper's Lagrangian, kept in the scale of one advantage.

    Raises ValueError if the multiplier is negative or not finite.
    """
    if not 0 <= multiplier < math.inf:
        raise ValueError(f"a Lagrange multiplier must be >= 0 and finite, got {multiplier}")
    return ((advantages - multiplier * cost_advantages) / (1.0 + multiplier)).astype(np.float32)
