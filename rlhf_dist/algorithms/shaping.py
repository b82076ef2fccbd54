"""Rewards before advantages: the KL penalty per token, the terminal reward's place, clipping, centring."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_dist.algorithms.kl import KlEstimator, kl
from rlhf_dist.algorithms.ragged import FloatArray, last_counted
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
