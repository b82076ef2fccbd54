"""What every role with a training engine can do: optimizer steps, checkpoints, export."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlhf_dist.algorithms.contract import Loss
from rlhf_dist.batch import Batch
from rlhf_dist.metrics import Mean, combine
from rlhf_dist.wire import Call, OpResult, WorkerContext
from workers.engines.training import TrainingEngine

NOTHING = Batch({}, 0)


class TrainedRole:
    """One rank of a role with a training engine."""

    def __init__(self, context: WorkerContext, engine: TrainingEngine) -> None:
        self.context, self.engine = context, engine
        self.moved = False
        """A step with a gradient was made since this was last set to False."""

    def update(
        self, batch: Batch, call: Call, loss: Loss, mini_batches: int, epochs: int, temperature: float = 1.0
    ) -> OpResult:
        """`epochs` passes over `mini_batches` cuts of the batch; all ranks step together, rows or not.

        `call.mini_batch` names each row's mini-batch; the controller drew it over the whole batch, so it
        does not depend on how many ranks there are.
        """
        assert call.mini_batch is not None, "the controller cuts updates into mini-batches"
        parts = [batch.take(np.flatnonzero(call.mini_batch == k)) for k in range(mini_batches)]
        before = self.engine.version
        metrics = combine(self.engine.step(part, loss, temperature) for _ in range(epochs) for part in parts)
        self.moved |= self.engine.version > before and metrics["grad_norm"].total > 0 and metrics["lr"].total > 0
        metrics["optimizer_steps"] = Mean(float(self.engine.version - before), 0)
        metrics["version"] = Mean(float(self.engine.version), 0)
        # Every rank knows the same numbers: one of them reports.
        return OpResult(columns=Batch({}, batch.num_rows), metrics=metrics if self.context.rank == 0 else {})

    def save(self, batch: Batch, call: Call, *, folder: str) -> OpResult:
        """Write this role's checkpoint, each rank its shards."""
        self.engine.save(Path(folder))
        return OpResult(columns=NOTHING)

    def load(self, batch: Batch, call: Call, *, folder: str) -> OpResult:
        """Restore this role's checkpoint; a generation engine gets it at the next reshard."""
        self.engine.load(Path(folder))
        return OpResult(columns=NOTHING)

    def export(self, batch: Batch, call: Call, *, folder: str) -> OpResult:
        """Write a Hugging Face folder."""
        self.engine.export(Path(folder))
        return OpResult(columns=NOTHING)
