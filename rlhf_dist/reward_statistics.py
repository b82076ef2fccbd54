"""Mean and deviation of all rewards so far, as a state: what a run's rewards are centred and scaled by.

    def recipe(prompts: Prompts, actor: Actor, reward: Reward, statistics: RewardStatistics, ...):
        batch = statistics.normalise(reward.compute_reward(batch))

Count, mean and summed squared distances are numbers of the state, so checkpoints have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult
from rlhf_dist.metrics import Mean, Spread
from rlhf_dist.missing import MISSING
from rlhf_dist.roles import State, state_op
from rlhf_dist.transforms.columns import numbers, present_rows


class RewardStatistics(State):
    """Of all rewards that were given to `normalise`; a missing one counts nowhere and stays missing."""

    def initial(self, cfg: Any) -> dict[str, Any]:
        """No rewards."""
        return {"count": 0.0, "mean": 0.0, "squares": 0.0}

    @state_op(reads=("rewards",), writes=("rewards",), missing=True)
    def normalise(
        self, values: Mapping[str, Any], batch: Batch, *, centre: bool = True, scale: bool = True, eps: float = 1e-8
    ) -> tuple[dict[str, Any], HostResult]:
        """(reward - mean) / (deviation + eps), both over all rewards so far, this batch's among them (divisor n)."""
        rewards = numbers(batch, "rewards", missing=True)
        present = present_rows(rewards)
        seen = Spread(values["count"], values["mean"], values["squares"]) + Spread.of(rewards[present])
        shaped = rewards[present].astype(np.float64) - (seen.mean if centre else 0.0)
        column = np.full(batch.num_rows, MISSING, dtype=np.float32)
        column[present] = shaped / (seen.value + eps) if scale and seen.squares else shaped
        return {"count": seen.count, "mean": seen.mean, "squares": seen.squares}, HostResult(
            columns=Batch({"rewards": Column(column)}, batch.num_rows),
            metrics={"running_mean": Mean(seen.mean), "running_std": Mean(seen.value)},
        )
