"""KL estimators from log-probs of sampled tokens, and the adaptive coefficient.

For y ~ pi, with d = log pi_ref(y) - log pi(y), three estimates of KL(pi || pi_ref) (Schulman,
"Approximating KL divergence", 2020, joschu.net/blog/kl-approx.html):

    k1 = -d                 unbiased, high variance, may be negative
    k2 = d^2 / 2            biased, low variance, its *gradient* is the gradient of the KL
    k3 = exp(d) - 1 - d     unbiased, low variance, never negative

All take numpy arrays or tensors of any shape, nats in and out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

A = TypeVar("A", "npt.NDArray[Any]", "Tensor")
KlEstimator = Literal["k1", "k2", "k3"]

LOG_RATIO_LIMIT = 20.0
"""Largest |log ratio| that is exponentiated: exp(20) = 5e8, so that no single token overflows float32."""


def k1(log_probs: A, ref_log_probs: A) -> A:
    """log pi - log pi_ref."""
    log_ratio: Any = log_probs - ref_log_probs
    return cast(A, log_ratio)


def k2(log_probs: A, ref_log_probs: A) -> A:
    """(log pi - log pi_ref)^2 / 2."""
    log_ratio: Any = log_probs - ref_log_probs
    return cast(A, 0.5 * log_ratio**2)


def k3(log_probs: A, ref_log_probs: A) -> A:
    """exp(d) - 1 - d with d = log pi_ref - log pi, cut to +-20 nats."""
    d: Any = (ref_log_probs - log_probs).clip(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return cast(A, (np.exp(d) if isinstance(d, np.ndarray) else d.exp()) - 1 - d)


def kl(log_probs: A, ref_log_probs: A, estimator: KlEstimator = "k3") -> A:
    """The estimator by name. Raises ValueError for another name."""
    if estimator == "k1":
        return k1(log_probs, ref_log_probs)
    if estimator == "k2":
        return k2(log_probs, ref_log_probs)
    if estimator == "k3":
        return k3(log_probs, ref_log_probs)
    raise ValueError(f"the KL estimator must be k1, k2 or k3, got {estimator!r}")


def adapted_kl_coef(coef: float, kl: float, *, target: float, gain: float = 0.1, largest_error: float = 0.2) -> float:
    """The next KL coefficient: larger when the measured KL is above `target` (nats per row), smaller when below.

    coef * (1 + gain * clip(kl / target - 1, -largest_error, largest_error)); Ziegler et al. 2019
    (arXiv 1909.08593), section 2.2. Raises ValueError if target is not positive.
    """
    if target <= 0:
        raise ValueError(f"the KL target must be > 0 nats, got {target}")
    error = min(max(kl / target - 1.0, -largest_error), largest_error)
    return coef * (1.0 + gain * error)
