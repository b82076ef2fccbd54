"""An update op: passes over mini-batches, one optimizer step for each. The same for every trained role."""

from __future__ import annotations

import numpy as np

from rlhf_dist.algorithms.contract import Loss
from rlhf_dist.batch import Batch
from rlhf_dist.metrics import Mean, combine
from rlhf_dist.wire import Call, OpResult, WorkerContext
from workers.engines.training import TrainingEngine


def run_update(
    engine: TrainingEngine,
    context: WorkerContext,
    batch: Batch,
    call: Call,
    *,
    loss: Loss,
    mini_batches: int,
    epochs: int,
    temperature: float = 1.0,
) -> OpResult:
    """`epochs` passes over `mini_batches` cuts of the batch; all ranks step together, rows or not.

    `call.mini_batch` names each row's mini-batch; the controller drew it over the whole batch, so it does
    not depend on how many ranks there are.
    """
    assert call.mini_batch is not None, "the controller cuts updates into mini-batches"
    parts = [batch.take(np.flatnonzero(call.mini_batch == k)) for k in range(mini_batches)]
    steps = [engine.step(part, loss, temperature) for _ in range(epochs) for part in parts]
    metrics = combine(steps)
    metrics["optimizer_steps"] = Mean(float(len(steps)), 0)
    metrics["version"] = Mean(float(engine.version), 0)
    # Every rank knows the same numbers: one of them reports.
    return OpResult(columns=Batch({}, batch.num_rows), metrics=metrics if context.rank == 0 else {})
