"""Advantages of turns.

A_t = G_k - mean of all G,   G_k = sum_{j >= k} gamma^(j - k) r_j     for every token t of turn k      REINFORCE
"""

from __future__ import annotations

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.transforms.columns import mean_of


@host_op(reads=("token_rewards", "turn", "response_mask"), writes=("advantages",), scope="batch")
def turn_returns(batch: Batch, *, gamma: float = 1.0) -> HostResult:
    """The discounted return from each turn on, less the mean over all turns of the batch, at each of its tokens."""
    offsets = batch["turn"].offsets
    assert offsets is not None, "one number a token"
    turns, rewards = batch["turn"].values, batch["token_rewards"].values
    returns, places = list[float](), list[np.ndarray]()
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        total = 0.0
        for turn in range(int(turns[begin:end].max(initial=-1)), -1, -1):
            at = begin + np.flatnonzero(turns[begin:end] == turn)
            total = float(rewards[at].sum()) + gamma * total
            returns.append(total)
            places.append(at)
    found = np.zeros(len(turns), np.float32)
    mean = float(np.mean(returns)) if returns else 0.0
    for total, at in zip(returns, places, strict=True):
        found[at] = total - mean
    found *= batch["response_mask"].values > 0
    return HostResult(
        columns=Batch({"advantages": Column(found, offsets)}, batch.num_rows),
        metrics={"turn_return": mean_of(np.array(returns, np.float32))},
    )
