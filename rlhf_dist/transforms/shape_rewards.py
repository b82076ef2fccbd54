"""Rewards before advantages: cut to a range, or brought to one scale."""

from __future__ import annotations

from typing import Literal

import numpy as np

from rlhf_dist.algorithms.advantages.whiten import whiten
from rlhf_dist.algorithms.shaping import clipped
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import Mean
from rlhf_dist.transforms.columns import numbers


@host_op(reads=("rewards",), writes=("rewards",), scope="rows")
def clip_rewards(batch: Batch, *, low: float, high: float) -> HostResult:
    """`rewards` cut to [low, high], reward units. Raises ValueError if low > high."""
    rewards = numbers(batch, "rewards")
    cut = clipped(rewards, low, high)
    share = Mean(float((cut != rewards).sum()), float(len(rewards)))
    return HostResult(columns=Batch({"rewards": Column(cut)}, batch.num_rows), metrics={"clipped_rewards": share})


@host_op(reads=("rewards",), writes=("rewards",), scope="batch")
def whiten_rewards(batch: Batch, *, centre: bool = False, eps: float = 1e-8, ddof: Literal[0, 1] = 0) -> Batch:
    """`rewards` with standard deviation 1 over the rows of the batch; the mean stays unless `centre`.

    Rewards that are all equal stay as they are, or become 0 with `centre`.
    """
    rewards = numbers(batch, "rewards")
    whitened = whiten(rewards, np.ones(len(rewards)), centre=centre, eps=eps, ddof=ddof)
    return Batch({"rewards": Column(whitened)}, batch.num_rows)
