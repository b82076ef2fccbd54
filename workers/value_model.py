"""Roles with a value head: the critic, and reward models (scored or trained)."""

from __future__ import annotations

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig
from rlhf_dist.metrics import Mean, reward_metrics
from rlhf_dist.wire import Call, OpResult, WorkerContext
from workers.build_engines import new_training_engine
from workers.model_outputs import TrunkOutputs
from workers.trained_role import TrainedRole


class ValueModelWorker(TrunkOutputs, TrainedRole):
    """One rank of a value model. Implements `rlhf_dist.roles.ValueModel` and its kinds, and `Reward` where that is a
    model."""

    def __init__(
        self, context: WorkerContext, model: ModelConfig, engine: EngineConfig, optimizer: OptimizerConfig | None
    ) -> None:
        """`optimizer` None: the model is frozen."""
        super().__init__(context, new_training_engine(model, engine, optimizer, "value", context), optimizer)

    def compute_values(self, batch: Batch, call: Call) -> OpResult:
        """V(s_t) before each response token."""
        values = self.engine.forward(batch, ("values",))["values"]
        total = float(values.values.sum(dtype=np.float64))
        return OpResult(
            columns=Batch({"values": values}, batch.num_rows),
            metrics={"value": Mean(total, float(len(values.values)))},
        )

    def compute_reward(self, batch: Batch, call: Call) -> OpResult:
        """The value head at the last token of every row."""
        scores = self.engine.scores(batch.select("prompt_ids", "response_ids"))
        if scores.ndim > 1:
            raise ValueError(
                f"{self.context.role} scores {scores.shape[1]} labels and a reward is one number a row; call "
                f"{self.context.role}.compute_scores(batch) and make rewards of its scores in a host op"
            )
        return OpResult(
            columns=Batch({"rewards": Column(scores)}, batch.num_rows),
            metrics=reward_metrics(scores),
        )

    def compute_attention(self, batch: Batch, call: Call) -> OpResult:
        """What the last token of each row attends to among its response tokens."""
        return OpResult(columns=Batch(self.engine.forward(batch, ("attention",)), batch.num_rows))

    def compute_scores(self, batch: Batch, call: Call) -> OpResult:
        """The value head's K numbers at the last token of every row."""
        scores = self.engine.scores(batch.select("prompt_ids", "response_ids"))
        of_each = scores if scores.ndim > 1 else scores[:, None]  # no rows have a shape, too
        return OpResult(columns=Batch({"scores": Column(of_each)}, batch.num_rows))

    update_critic = update_reward_model = TrainedRole.update
