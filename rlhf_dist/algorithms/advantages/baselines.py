"""Advantages without a critic: one number per row, from the rewards of the rows of its group.

`groups` [B] holds 0..G-1: which group a row belongs to. Sums run in float64.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from rlhf_dist.algorithms.ragged import Float64Array, FloatArray
from rlhf_dist.batch import IntArray


def group_relative(
    rewards: FloatArray,
    groups: IntArray,
    *,
    scale: bool = True,
    eps: float = 1e-6,
    ddof: Literal[0, 1] = 0,
    scale_over: Literal["group", "batch"] = "group",
) -> FloatArray:
    """(r - mean) / (std + eps) over the group, std with divisor n: GRPO (Shao et al. 2024, arXiv 2402.03300, 4.1.2).

    `scale=False` leaves the std out, as Dr. GRPO does (Liu et al. 2025, arXiv 2503.20783). `ddof=1` takes the std with
    divisor n - 1. `scale_over="batch"` divides by the std of all rewards given, instead of each group's. Exactly 0 in
    a group whose rewards are all equal.
    """
    count, total = _count_and_total(rewards, groups)
    equal = all_equal(rewards, groups)
    centred = np.where(equal[groups], 0.0, rewards - (total / count)[groups])
    if scale and scale_over == "batch" and len(rewards) > ddof:
        centred = centred / (rewards.std(dtype=np.float64, ddof=ddof) + eps)
    elif scale:
        variance = np.bincount(groups, weights=centred**2, minlength=len(count)) / np.maximum(count - ddof, 1)
        centred = centred / (np.sqrt(variance) + eps)[groups]
    return centred.astype(np.float32)


def leave_one_out(rewards: FloatArray, groups: IntArray) -> FloatArray:
    """r_i - mean of the other rewards of the group: RLOO (Ahmadian et al. 2024, arXiv 2402.14740, section 3.3).

    0 for a row that is alone in its group: there is no other reward to compare it with.
    """
    count, total = _count_and_total(rewards, groups)
    others = np.maximum(count - 1, 1)[groups]
    advantages = rewards - (total[groups] - rewards) / others
    return np.where(all_equal(rewards, groups)[groups], 0.0, advantages).astype(np.float32)


def versus_baseline(rewards: FloatArray, baseline_rewards: FloatArray) -> FloatArray:
    """r(y) - r(greedy y), row by row: ReMax (Li et al. 2023, arXiv 2310.10505, algorithm 1)."""
    return (rewards.astype(np.float64) - baseline_rewards).astype(np.float32)


def all_equal(rewards: FloatArray, groups: IntArray) -> npt.NDArray[np.bool_]:
    """[G]: whether every row of the group has the same reward (true for a group of one)."""
    size = int(groups.max(initial=-1)) + 1
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(low, groups, rewards)
    np.maximum.at(high, groups, rewards)
    equal: npt.NDArray[np.bool_] = low == high
    return equal


def _count_and_total(rewards: FloatArray, groups: IntArray) -> tuple[Float64Array, Float64Array]:
    total = np.zeros(int(groups.max(initial=-1)) + 1, dtype=np.float64)
    np.add.at(total, groups, rewards)
    return np.bincount(groups).astype(np.float64), total
