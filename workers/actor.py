"""The actor: a training engine and, where the recipe generates, a generation engine in the same process."""

from __future__ import annotations

import hashlib

import numpy as np

from rlhf_dist.algorithms.contract import Loss
from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import ActorConfig
from rlhf_dist.metrics import Mean
from rlhf_dist.reshard.groups import colocated_axes, rollout_grid
from rlhf_dist.sampling import Sampling
from rlhf_dist.wire import Call, OpResult, WorkerContext
from workers.engines.build import new_generation_engine, new_training_engine
from workers.engines.generation import GenerationEngine, Response
from workers.reshard.colocated import ColocatedSync
from workers.trained_role import NOTHING, TrainedRole


class ActorWorker(TrainedRole):
    """One rank of the actor. Implements `rlhf_dist.roles.Actor`, and `reshard`."""

    def __init__(self, context: WorkerContext, config: ActorConfig, trains: bool = True) -> None:
        """`trains` False: no optimizer (evaluation only). The generation engine comes up after the training
        engine: it reuses the process group that is there by then."""
        optimizer = config.optimizer if trains else None
        engine = new_training_engine(config.model, config.engine, optimizer, "policy", context)
        super().__init__(context, engine, optimizer)
        self.config = config
        self.temperature = config.rollout.temperature
        self.rollout: GenerationEngine | None = None
        if context.generates:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(config.model.path)
            copies = rollout_grid(colocated_axes(config, context.nodes or (0,) * context.world)).tolist()
            self.rollout = new_generation_engine(config.model.path, config.rollout, context, copies)
            self.sync = ColocatedSync(self.engine, self.rollout, config.rollout, context)

    def generate_sequences(self, batch: Batch, call: Call, *, n: int = 1, greedy: bool = False) -> OpResult:
        """`n` responses a prompt. What is drawn depends on (run seed, step, node, row, copy) only."""
        assert self.rollout is not None, "the recipe was planned without generation"
        rollout = self.config.rollout
        sampling = Sampling(
            n=n,
            greedy=greedy,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_tokens=rollout.max_response_tokens,
        )
        prompts = [batch["prompt_ids"].row(row) for row in range(batch.num_rows)]
        seeds = [_seed(call.seed, call.step, call.node, int(row), copy) for row in call.row_index for copy in range(n)]
        self.sync.turn("generate")
        responses = self.rollout.generate(prompts, sampling, seeds)
        parent = np.repeat(np.arange(batch.num_rows), n)
        columns = response_columns(responses, self.rollout.weights_version)
        columns["response"] = Column.strings(
            self.tokenizer.batch_decode([r.token_ids for r in responses], skip_special_tokens=True)
        )
        lengths = columns["response_ids"].lengths
        tokens = batch["prompt_ids"].lengths[parent] + lengths
        rows = float(len(responses))
        return OpResult(
            columns=Batch(columns, len(responses)),
            parent=parent,
            tokens=tokens,
            metrics={
                "response_tokens": Mean(float(lengths.sum()), rows),
                "finished": Mean(float(columns["finished"].values.sum()), rows),
                "empty_responses": Mean(float((lengths == 0).sum()), 0),
                "rows": Mean(rows, 0),
                "sequence_tokens": Mean(float(tokens.sum()), 0),
            },
        )

    def compute_log_prob(self, batch: Batch, call: Call) -> OpResult:
        """Old log-probs and entropy under the training engine, at the sampling temperature."""
        found = self.engine.forward(batch, ("log_probs", "entropy"), self.temperature)
        entropy = found["entropy"].values
        return OpResult(
            columns=Batch({"old_log_probs": found["log_probs"], "entropy": found["entropy"]}, batch.num_rows),
            metrics={"entropy": Mean(float(entropy.sum(dtype=np.float64)), float(len(entropy)))},
        )

    def update_actor(self, batch: Batch, call: Call, *, loss: Loss, mini_batches: int, epochs: int) -> OpResult:
        """Optimizer steps on `loss`."""
        temperature = self.temperature if self.context.generates else 1.0
        return self.update(batch, call, loss, mini_batches, epochs, temperature)

    def reshard(self, batch: Batch, call: Call) -> OpResult:
        """Move the trained weights to the generation engine, verified: version, count, per-parameter checksums."""
        assert self.rollout is not None, "the recipe was planned without generation"
        report = self.sync.run(must_change=self.moved)
        self.moved = False
        metrics = {
            "sync_seconds": Mean(report.seconds, 1),
            "sync_bytes": Mean(float(report.bytes_received), 0),
            "sync_parameters": Mean(float(report.parameters), 0),
        }
        if self.sync.turns is not None:
            for phase, peak in self.sync.turns.peak_bytes.items():
                metrics[f"peak_bytes_{phase}"] = Mean(float(peak), 1)
                metrics[f"predicted_bytes_{phase}"] = Mean(float(self.sync.turns.predicted[phase]), 1)
        return OpResult(columns=NOTHING, metrics=metrics if self.context.rank == 0 else {})

    def close(self) -> None:
        """Free what the generation engine holds outside the process."""
        if self.rollout is not None:
            self.rollout.close()


def response_columns(responses: list[Response], version: int) -> dict[str, Column]:
    """The columns that generation writes, text aside."""
    ids = Column.ragged([r.token_ids for r in responses], dtype=np.int32)
    return {
        "response_ids": ids,
        "response_mask": Column(np.ones(len(ids.values), dtype=np.uint8), ids.offsets),
        "rollout_log_probs": Column.ragged([r.log_probs for r in responses], dtype=np.float32),
        "finished": Column.dense([r.finished for r in responses], dtype=np.uint8),
        "policy_version": Column(np.full(len(responses), version, dtype=np.int32)),
    }


def _seed(*parts: int | str) -> int:
    """A 63-bit seed that is the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
