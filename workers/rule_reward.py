"""A reward that is a function of the text; runs on CPU processes, imports no torch."""

from __future__ import annotations

from rlhf_dist.batch import Batch
from rlhf_dist.rewards import RuleReward, rule_rewards
from rlhf_dist.wire import Call, OpResult, WorkerContext


class RuleRewardWorker:
    """One CPU process scoring its share of the rows. Implements `rlhf_dist.roles.Reward`."""

    def __init__(self, context: WorkerContext, function: RuleReward) -> None:
        """`function(prompt, response, answer)` gives a number, or named numbers with `reward` among them."""
        self.function = function

    def compute_reward(self, batch: Batch, call: Call) -> OpResult:
        """The reward of every row. A function that raises or gives no number is an error naming the row."""
        scored = rule_rewards(self.function, batch)
        return OpResult(columns=scored.columns, metrics=scored.metrics)
