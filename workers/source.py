"""A source of rows: reads or generates them, tokenizes them. Runs on a CPU process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import DataConfig, SourceConfig
from rlhf_dist.data.of_launch import open_source
from rlhf_dist.metrics import Mean
from rlhf_dist.wire import Call, OpResult, WorkerContext


class SourceWorker:
    """Rows of one data set. What step t emits depends on (config, seed, t) only: nothing to checkpoint."""

    def __init__(
        self,
        context: WorkerContext,
        config: SourceConfig,
        data: DataConfig,
        tokenizer: str,
        heldout: SourceConfig | None = None,
        fields: Mapping[str, str] = MappingProxyType({}),
        first_group: int = 0,
    ) -> None:
        """`tokenizer`: a model folder. `heldout`: rows whose prompts must not be emitted. fields, first_group: see
        `PromptSource`."""
        self.source = open_source(
            config,
            data,
            tokenizer=tokenizer,
            seed=context.seed,
            heldout=heldout,
            fields=fields,
            first_group=first_group,
        )

    def next_batch(
        self, batch: Batch, call: Call, *, rows: int, shift: int = 0, position: int | None = None
    ) -> OpResult:
        """The rows of step `call.step`; with rows = 0 every row once, whatever the step.

        shift: see `PromptSource.emit`. position: where the rows begin among all that the run draws, and rows = 0 is
        none, for a source that is not drawn as often in every step.
        """
        if position is not None:
            emitted = self.source.take(position + np.arange(rows))
        else:
            emitted = self.source.emit(call.step, rows, shift) if rows else self.source.every()
        drawn = (call.step + 1) * rows + shift if position is None else position + rows
        tokens = emitted["prompt_ids"].lengths
        if "response_ids" in emitted:
            tokens = tokens + emitted["response_ids"].lengths
        counts = self.source.counts
        metrics = {
            "rows": emitted.num_rows,
            "sequence_tokens": tokens.sum(),
            "prompts_too_long": counts.too_long,
            "prompts_heldout": counts.heldout,
            "responses_cut": counts.cut,
            "answers_missing": counts.without_answer,
            **(self.source.epochs(drawn) if rows else {}),
        }
        if "label" in emitted:
            metrics["pairs_equal"] = counts.equal
        if "response_mask" in emitted:
            metrics["trained_tokens"] = emitted["response_mask"].values.sum(dtype=np.int64)
        return OpResult(
            columns=emitted,
            tokens=tokens,
            groups=emitted["group_id"].values.astype(np.int64),
            metrics={name: Mean(float(value), 0) for name, value in metrics.items()},
            state=None if position is None else {"drawn": float(position + rows)},
        )

    def dump(self, batch: Batch, call: Call, *, folder: str, rows: int) -> OpResult:
        """Write the first `rows` rows to `folder`/step_N.parquet, prompts and responses as text."""
        index = np.arange(min(rows, batch.num_rows))
        taken = batch.take(index).with_columns(step=Column(np.full(len(index), call.step)))
        taken.write_parquet(Path(folder) / f"step_{call.step:06d}.parquet")
        return OpResult(columns=Batch({}, 0))
