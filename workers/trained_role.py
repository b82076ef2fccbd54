"""What every role with a training engine can do: optimizer steps, checkpoints, export."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from rlhf_dist.algorithms.contract import Loss
from rlhf_dist.batch import Batch
from rlhf_dist.config import OptimizerConfig
from rlhf_dist.metrics import Mean, Metrics, combine
from rlhf_dist.missing import refuse_missing
from rlhf_dist.wire import Call, OpResult, WorkerContext
from workers.engines.files.checkpoint import SAVE_TIMEOUT_S
from workers.engines.files.rank_state import RankState
from workers.engines.training.interface import NonFiniteLoss, Term, TrainingEngine
from workers.memory.arbiter import arbiter_of
from workers.weight_sets import NOTHING, WeightSets


class TrainedRole(WeightSets):
    """One rank of a role with a training engine."""

    def __init__(
        self,
        context: WorkerContext,
        engine: TrainingEngine,
        optimizer: OptimizerConfig | None,
        temperature: float = 1.0,
        shared: bool = False,
    ) -> None:
        """optimizer None: the model is frozen. temperature: log-probs are taken at. shared: the engine is another
        role's, which has entered it."""
        self.context, self.engine, self.memory, self.temperature = context, engine, arbiter_of(context), temperature
        self.remarks = () if shared else engine.remarks
        if not shared:
            self.memory.add_training(context.role, engine, trained=optimizer is not None)
        self.moved = self.rewritten = False
        """A step with a gradient was made since this was last set to False."""
        self.nonfinite = optimizer.nonfinite if optimizer else "stop"
        self._saving: Future[None] | None = None

    def update(
        self,
        given: Batch | tuple[Batch, ...],
        call: Call,
        *,
        mini_batches: int,
        epochs: int,
        loss: Loss | None = None,
        terms: Sequence[tuple[Loss, float]] = (),
    ) -> OpResult:
        """`epochs` passes over `mini_batches` cuts of the batch; all ranks step together, rows or not.

        loss: of the one batch; or terms: loss and weight of each. `call.mini_batch` names each row's mini-batch; the
        controller drew it over the whole batch, so it does not depend on how many ranks there are. Raises ValueError
        where a number that a loss reads is missing: it would be compared as if it were one.
        """
        batches = given if isinstance(given, tuple) else (given,)
        summands = terms or ([(loss, 1.0)] if loss is not None else [])
        for batch in batches:
            refuse_missing(f"the loss of {call.node}", batch, batch, can_declare=False)
        steps = [
            [
                (weight, one, batch.take(np.flatnonzero(rows.mini_batch == k)))
                for (one, weight), batch, rows in zip(summands, batches, call.batches, strict=True)
            ]
            for k in range(mini_batches)
        ]
        before = self.engine.version
        skipped: list[str] = []
        metrics = combine(self._step(step, call, skipped) for _ in range(epochs) for step in steps)
        if skipped:
            metrics["skipped_steps"] = Mean(float(len(skipped)), 0)
        # A step on a zero gradient, or at rate zero, need not change a bit.
        self.moved |= self.engine.version > before and metrics["grad_norm"].value > 0 and metrics["lr"].value > 0
        metrics["optimizer_steps"] = Mean(float(self.engine.version - before), 0)
        metrics["version"] = Mean(float(self.engine.version), 0)
        # Every rank knows the same numbers: one of them reports.
        return OpResult(columns=Batch({}, batches[0].num_rows), metrics=metrics if self.context.rank == 0 else {})

    def _step(self, terms: list[Term], call: Call, skipped: list[str]) -> Metrics:
        try:
            return self.engine.step_many(terms, self.temperature)
        except NonFiniteLoss as error:
            for k, (_, _, part) in enumerate(terms):
                found = np.isin(part["group_id"].values, error.groups) if error.groups else np.ones(part.num_rows, bool)
                if found.any() or k == 0:
                    error.rows_file = self._dump(part.take(np.flatnonzero(found)), call, k)
            if self.nonfinite == "stop":
                raise
            skipped.append(str(error))
            print(f"step {call.step}: skipped an optimizer step: {error}", flush=True)
            return {}

    def _dump(self, rows: Batch, call: Call, term: int) -> str:
        """Rows that a step failed on, as Parquet in the run's folder, a file a rank; returns the files' pattern."""
        import pyarrow.parquet as pq

        folder = Path(self.context.folder) / "nonfinite"
        name = f"step_{call.step}_{call.node}" + (f"_term_{term + 1}" if term else "")
        if rows.num_rows:
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(rows.to_arrow(), folder / f"{name}_rank_{self.context.rank}.parquet")
        return str(folder / f"{name}_rank_*.parquet")

    def save(self, batch: Batch, call: Call, *, folder: str) -> OpResult:
        """Copy this role's state, each rank its shards; they are written while the run goes on."""
        self._saving = self.engine.save(Path(folder))
        return OpResult(columns=NOTHING)

    def saved(self, batch: Batch, call: Call, *, wait: bool) -> OpResult:
        """Whether the last `save` is written on all ranks (`pending` 0); raises what ended it."""
        assert self._saving is not None, "save comes first"
        if wait or self._saving.done():
            self._saving.result(SAVE_TIMEOUT_S)
        return OpResult(columns=NOTHING, metrics={"pending": Mean(0.0 if self._saving.done() else 1.0, 0)})

    def load(self, batch: Batch, call: Call, *, folder: str) -> OpResult:
        """Restore this role's checkpoint; a generation engine gets it at the next reshard."""
        self.engine.load(Path(folder))
        # Its process may have trained further: weights that are loaded need not differ from those synced last.
        self.moved = self.rewritten = False
        return OpResult(columns=NOTHING)

    def put_back(self, copy: RankState) -> None:
        """The same from a copy in memory."""
        self.engine.put_back(copy)
        self.moved = self.rewritten = False

    def export(self, batch: Batch, call: Call, *, folder: str) -> OpResult:
        """Write a Hugging Face folder."""
        self.engine.export(Path(folder))
        return OpResult(columns=NOTHING)

    def close(self) -> None:
        """Let go of what outlives the engine."""
        self.engine.close()
