"""A reward that is a function of the text, computed in a process beside this one; imports no torch."""

from __future__ import annotations

from rlhf_dist.batch import Batch
from rlhf_dist.missing import MISSING
from rlhf_dist.rewards.child import Limits
from rlhf_dist.rewards.here import ScoringHere
from rlhf_dist.rewards.load import LoadedReward
from rlhf_dist.rewards.process import ScoringProcess
from rlhf_dist.rewards.rule import arguments, reward_columns
from rlhf_dist.wire import Call, OpResult, WorkerContext


class RuleRewardWorker:
    """One CPU process scoring its share of the rows. Implements `rlhf_dist.roles.Reward`."""

    def __init__(
        self, context: WorkerContext, function: LoadedReward, limits: Limits, failed_reward: float | str | None
    ) -> None:
        """`failed_reward`: of a row whose call failed, "missing" for none; None: that is an error naming the row."""
        self.function = function
        self.failed_reward = float(MISSING) if isinstance(failed_reward, str) else failed_reward
        self.process = ScoringHere(function) if context.here else ScoringProcess(function, limits, context.role)

    def compute_reward(self, batch: Batch, call: Call) -> OpResult:
        """The reward of every row."""
        signature = self.function.signature
        outcomes = self.process.score(arguments(signature, batch), batch.num_rows, stop=self.failed_reward is None)
        scored = reward_columns(signature.name, batch, outcomes, self.failed_reward)
        return OpResult(columns=scored.columns, metrics=scored.metrics)

    def close(self) -> None:
        """End the process that computes."""
        self.process.close()
