"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eqs. 11, 12 and 16).

delta_t = r_t + gamma V_{t+1} - V_t          V after the last token is 0: the trajectory is over
A_t     = delta_t + gamma lam A_{t+1}        return_t = A_t + V_t
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_dist.algorithms.ragged import Float64Array, FloatArray, row_of_token
from rlhf_dist.batch import IntArray


def gae(
    token_rewards: FloatArray,
    values: FloatArray,
    offsets: IntArray,
    mask: npt.NDArray[Any],
    gamma: float,
    lam: float,
) -> tuple[FloatArray, FloatArray]:
    """Advantages and returns, both [N], from token_rewards [N], values [N] and mask [N] (> 0: counted).

    Tokens that are not counted (a tool's output between two turns) are not steps: t + 1 is the next
    *counted* token of the row, however far away, with no discount for what lies between. A reward that
    arrives at such a token belongs to the last counted token before it, the action that earned it; one
    that arrives before the row's first counted token was earned by no action and is left out. Advantages
    and returns of tokens that are not counted are 0.
    """
    counted = np.flatnonzero(mask > 0)
    row = row_of_token(offsets)
    steps = np.bincount(row[counted], minlength=len(offsets) - 1)
    first_step = np.cumsum(steps) - steps
    column = np.arange(len(counted)) - np.repeat(first_step, steps)

    # Left-aligned [B, longest] views with zeros behind: there delta and A stay 0, as after the last token.
    shape = (len(offsets) - 1, int(steps.max(initial=0)) + 1)
    padded_rewards = np.zeros(shape, dtype=np.float64)
    padded_values = np.zeros(shape, dtype=np.float64)
    padded_rewards[row[counted], column] = _earned(token_rewards, row, mask)[counted]
    padded_values[row[counted], column] = values[counted]

    padded_advantages = np.zeros(shape, dtype=np.float64)
    for t in range(shape[1] - 2, -1, -1):
        delta = padded_rewards[:, t] + gamma * padded_values[:, t + 1] - padded_values[:, t]
        padded_advantages[:, t] = delta + gamma * lam * padded_advantages[:, t + 1]

    advantages = np.zeros(len(values), dtype=np.float32)
    returns = np.zeros(len(values), dtype=np.float32)
    advantages[counted] = padded_advantages[row[counted], column]
    returns[counted] = (padded_advantages + padded_values)[row[counted], column]
    return advantages, returns


def _earned(token_rewards: FloatArray, row: IntArray, mask: npt.NDArray[Any]) -> Float64Array:
    """[N]: each reward moved back to the last counted token at or before it in its row."""
    positions = np.arange(len(row))
    owner = np.maximum.accumulate(np.where(mask > 0, positions, -1)) if len(row) else positions
    owned = (owner >= 0) & (row[owner] == row)
    earned = np.zeros(len(row), dtype=np.float64)
    np.add.at(earned, owner[owned], token_rewards[owned])
    return earned
