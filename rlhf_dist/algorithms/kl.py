"""KL estimators from log-probs of sampled tokens, and the adaptive coefficient.

For y ~ pi, with d = log pi_ref(y) - log pi(y), three estimates of KL(pi || pi_ref) (Schulman,
"Approximating KL divergence", 2020, joschu.net/blog/kl-approx.html):

    k1  = -d                unbiased, high variance, may be negative
    k2  = d^2 / 2           biased, low variance, its *gradient* is the gradient of the KL
    k3  = exp(d) - 1 - d    unbiased, low variance, never negative
    abs = |d|               no estimate of the KL; a distance that pulls alike however far away

All take numpy arrays or tensors of any shape, nats in and out.

Names of the metrics, the same in every op and loss, as means over counted tokens, nats a token. Each is of the policy
that sampled (or stands for it) to another:

    ref_kl       KL(pi || pi_ref)           how far the policy is from the reference
    old_kl       KL(pi_old || pi)           how far this step's updates have moved it
    rollout_kl   KL(pi_rollout || pi_old)   how far the sampler is from the trainer

`X_kl` is the mean log-ratio (k1), `X_kl_k3` the mean of k3 (`X_kl_k2`, `X_kl_abs` where a loss uses those). One token
of a large log-ratio decides a mean of k3 (20 nats: 4.85e8), and k1 beside it shows whether one did. `cap` cuts what a
token may add; it is off unless set, since what is cut gives no gradient.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

A = TypeVar("A", "npt.NDArray[Any]", "Tensor")
KlEstimator = Literal["k1", "k2", "k3", "abs"]
KL_ESTIMATORS: tuple[str, ...] = ("k1", "k2", "k3", "abs")

LOG_RATIO_LIMIT = 20.0
"""Largest log ratio that is exponentiated: exp(20) = 5e8, so that no single token overflows float32."""


def k1(log_probs: A, ref_log_probs: A) -> A:
    """log pi - log pi_ref."""
    log_ratio: Any = log_probs - ref_log_probs
    return cast(A, log_ratio)


def k2(log_probs: A, ref_log_probs: A) -> A:
    """(log pi - log pi_ref)^2 / 2."""
    log_ratio: Any = log_probs - ref_log_probs
    return cast(A, 0.5 * log_ratio**2)


def k3(log_probs: A, ref_log_probs: A) -> A:
    """exp(d) - 1 - d with d = log pi_ref - log pi.

    d above 20 counts as 20, and gives no gradient. Below there is no limit: a token that the policy likes far more
    than the reference does is pulled back, however far it is.
    """
    d: Any = (ref_log_probs - log_probs).clip(None, LOG_RATIO_LIMIT)
    # exp(d) - 1 would lose what is left at small d: -6e-8 at d = 1e-4 in float32, where 5e-9 is right.
    return cast(A, (np.expm1(d) if isinstance(d, np.ndarray) else d.expm1()) - d)


def kl(log_probs: A, ref_log_probs: A, estimator: KlEstimator = "k3", cap: float = 0.0) -> A:
    """The estimator by name, cut to [-cap, cap]: what is outside gives no gradient. `cap=0` cuts nothing.

    Raises ValueError for another name, or a negative cap.
    """
    check_kl(estimator, cap)
    if estimator == "k1":
        found = k1(log_probs, ref_log_probs)
    elif estimator == "k2":
        found = k2(log_probs, ref_log_probs)
    elif estimator == "k3":
        found = k3(log_probs, ref_log_probs)
    else:
        found = cast(A, abs(cast(Any, log_probs - ref_log_probs)))
    return cast(A, cast(Any, found).clip(-cap, cap)) if cap else found


def check_kl(estimator: str, cap: float = 0.0) -> None:
    """Raises ValueError for an estimator that is not known or a negative cap."""
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"the KL estimator must be k1, k2 or k3, or abs, got {estimator!r}")
    if not cap >= 0:
        raise ValueError(f"the KL cap must be > 0 nats a token, or 0 for none, got {cap}")


def named_kl(name: str, log_probs: A, other_log_probs: A, cap: float = 0.0) -> dict[str, A]:
    """`name` (k1) and `name_k3` of each token, as metrics call them; `cap` cuts k3."""
    return {name: k1(log_probs, other_log_probs), f"{name}_k3": kl(log_probs, other_log_probs, "k3", cap)}


def adapted_kl_coef(coef: float, kl: float, *, target: float, gain: float = 0.1, largest_error: float = 0.2) -> float:
    """The next KL coefficient: larger when the measured KL is above `target` (nats per row), smaller when below.

    coef * (1 + gain * clip(kl / target - 1, -largest_error, largest_error)); Ziegler et al. 2019
    (arXiv 1909.08593), section 2.2. Raises ValueError if target is not positive or the measured KL not finite.
    """
    if not math.isfinite(kl):
        raise ValueError(f"the measured KL must be a finite number of nats, got {kl}; look at the log-probs")
    if target <= 0:
        raise ValueError(f"the KL target must be > 0 nats, got {target}")
    error = min(max(kl / target - 1.0, -largest_error), largest_error)
    return coef * (1.0 + gain * error)
