"""Rewards before advantages: the KL penalty per token, the terminal reward's place, what is made of a reward, or of
several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rlhf_dist.algorithms.kl import KlEstimator, kl
from rlhf_dist.algorithms.ragged import Float64Array, FloatArray, last_counted
from rlhf_dist.batch import IntArray


def place_terminal(rewards: FloatArray, offsets: IntArray, mask: npt.NDArray[Any]) -> FloatArray:
    """One reward per row [B] -> per token [N]: at the row's last counted token, 0 elsewhere.

    A row without a counted token has no action to reward: its reward has no place and is left out.
    """
    last = last_counted(offsets, mask)
    placed = np.zeros(len(mask), dtype=np.float32)
    placed[last[last >= 0]] = rewards[last >= 0]
    return placed


def kl_penalty(
    log_probs: FloatArray,
    ref_log_probs: FloatArray,
    mask: npt.NDArray[Any],
    kl_coef: float,
    estimator: KlEstimator = "k1",
    cap: float = 0.0,
) -> FloatArray:
    """-kl_coef * KL estimate (k1: log pi - log pi_ref) for each counted token [N], 0 for the others.

    With k1 the reward r_t = -beta log(pi/pi_ref) of Ziegler et al. 2019 (arXiv 1909.08593), given token by token.
    """
    estimate = kl(log_probs, ref_log_probs, estimator, cap)
    penalty: FloatArray = np.where(mask > 0, -kl_coef * estimate, 0.0).astype(np.float32)
    return penalty


def clipped(rewards: FloatArray, low: float, high: float) -> FloatArray:
    """Rewards cut to [low, high]. Raises ValueError if low > high."""
    if low > high:
        raise ValueError(f"reward clipping needs low <= high, got [{low}, {high}]")
    cut: FloatArray = np.clip(rewards, low, high)
    return cut


def centred(rewards: FloatArray, baseline: FloatArray | float) -> FloatArray:
    """Rewards minus a baseline: a constant, or one number per row (e.g. the reward of a reference answer)."""
    difference: FloatArray = (rewards - np.asarray(baseline)).astype(np.float32)
    return difference


def log_sigmoid(x: npt.NDArray[Any]) -> Float64Array:
    """log(1 / (1 + exp(-x))), exact for large |x| of either sign."""
    found: Float64Array = -np.logaddexp(0.0, -np.asarray(x, dtype=np.float64))
    return found


def against_reference(
    rewards: FloatArray, reference: FloatArray, shape: Literal["delta", "sigmoid", "log_sigmoid"], scale: float = 1.0
) -> FloatArray:
    """Rewards [B] against those of a reference answer to the same prompt, d = scale * (r - r_ref).

    delta        d                                  centred by the reference answer
    sigmoid      1 / (1 + exp(-d)), in (0, 1)       PAR (Fu et al. 2025, arXiv 2502.18770), with one reference answer
    log_sigmoid  log of that, <= 0                  Wang et al. 2024 (arXiv 2402.00742): sums of it are a conjunction
    """
    d = scale * (rewards.astype(np.float64) - reference)
    if shape == "delta":
        return d.astype(np.float32)
    shaped = log_sigmoid(d)
    return (np.exp(shaped) if shape == "sigmoid" else shaped).astype(np.float32)


def overlong_penalty(lengths: IntArray, longest: int, slack: float) -> FloatArray:
    """[B] in [-1, 0]: 0 up to (1 - slack) * longest tokens, then falling evenly to -1 at `longest`, and -1 beyond.

    DAPO's soft overlong punishment (Yu et al. 2025, arXiv 2503.14476, eq. 13), its L_cache = slack * longest. Raises
    ValueError unless 0 < slack <= 1 and longest >= 1.
    """
    if not (0 < slack <= 1 and longest >= 1):
        raise ValueError(f"an overlong penalty needs 0 < slack <= 1 and longest >= 1, got {slack} and {longest}")
    over = (lengths - (1 - slack) * longest) / (slack * longest)
    return -np.clip(over, 0, 1).astype(np.float32)


Combine = Literal["mean", "median", "wco", "mean_std", "uwo", "nominal_worst", "weighted"]


def combined(scores: FloatArray, how: Combine, coef: float = 0.0, weights: Sequence[float] = ()) -> FloatArray:
    """One reward [B] of K scores [K, B]; variances have divisor K.

    mean, wco (the least), uwo (mean - coef * variance)    Coste et al. 2023 (arXiv 2310.02743)
    median, mean_std (mean - coef * deviation)             Eisenstein et al. 2023 (arXiv 2312.09244)
    nominal_worst (coef * first + (1 - coef) * least)      Yan et al. 2024 (arXiv 2409.15360)
    weighted (sum of weights[k] * score[k])                Raises ValueError unless there is a weight for each score.
    """
    x = np.asarray(scores, dtype=np.float64)
    if how == "weighted" and len(weights) != len(x):
        raise ValueError(f"a weighted sum needs a weight for each of {len(x)} scores, got {len(weights)}")
    found: dict[str, Callable[[], Any]] = {
        "mean": lambda: x.mean(0),
        "median": lambda: np.median(x, axis=0),
        "wco": lambda: x.min(0),
        "mean_std": lambda: x.mean(0) - coef * x.std(0),
        "uwo": lambda: x.mean(0) - coef * x.var(0),
        "nominal_worst": lambda: coef * x[0] + (1 - coef) * x.min(0),
        "weighted": lambda: np.asarray(weights, dtype=np.float64) @ x,
    }
    if how not in found:
        raise ValueError(f"scores are combined by {', '.join(found)}; got {how!r}")
    return np.asarray(found[how](), dtype=np.float32)
