"""The actor: a training engine and, unless generation has a pool of its own, a generation engine beside it."""

from __future__ import annotations

import time

import numpy as np
import torch

from rlhf_dist.algorithms.contract import Loss
from rlhf_dist.batch import Batch
from rlhf_dist.config import ActorConfig
from rlhf_dist.metrics import Mean
from rlhf_dist.wire import Call, OpResult, WorkerContext
from workers.engines.build import new_training_engine
from workers.rollout import RolloutWorker, sync_metrics
from workers.trained_role import NOTHING, TrainedRole
from workers.weight_bridge import Announcement, WeightBridge


class ActorWorker(TrainedRole):
    """One rank of the actor. Implements `rlhf_dist.roles.Actor`, and `reshard`."""

    def __init__(
        self, context: WorkerContext, config: ActorConfig, trains: bool = True, generates_here: bool = True
    ) -> None:
        """`trains` False: no optimizer (evaluation only). The generation engine comes up after the training
        engine: it reuses the process group that is there by then."""
        optimizer = config.optimizer if trains else None
        super().__init__(context, new_training_engine(config.model, config.engine, optimizer, "policy", context))
        self.config = config
        self.temperature = config.rollout.temperature
        here = context.generates and generates_here
        self.generation = RolloutWorker(context, config, 0 if trains else None) if here else None
        self.bridge: WeightBridge | None = None

    def generate_sequences(self, batch: Batch, call: Call, *, n: int = 1, greedy: bool = False) -> OpResult:
        """`n` responses a prompt."""
        assert self.generation is not None, "the recipe was planned without generation in this pool"
        return self.generation.generate_sequences(batch, call, n=n, greedy=greedy)

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
        assert self.generation is not None, "the recipe was planned without generation in this pool"
        started = time.perf_counter()
        dtype = getattr(torch, self.config.rollout.dtype)
        expected = self.engine.checksums(dtype)
        report = self.generation.engine.receive_weights(
            self.engine.version, self.engine.full_weights(dtype, self.config.rollout.bucket_bytes), expected
        )
        self.generation.weights_step = call.step + 1
        metrics = sync_metrics(time.perf_counter() - started, report.bytes, report.parameters)
        return OpResult(columns=NOTHING, metrics=metrics if self.context.rank == 0 else {})

    def connect(self, bridge: WeightBridge) -> None:
        """Where weights go, when generation has a pool of its own."""
        self.bridge = bridge

    def send_weights(self, batch: Batch, call: Call) -> OpResult:
        """The same move to another pool, whose ranks receive and verify meanwhile."""
        assert self.bridge is not None, "the session connects both ends before the first sync"
        dtype = getattr(torch, self.config.rollout.dtype)
        announcement = Announcement(version=self.engine.version, checksums=self.engine.checksums(dtype))
        self.bridge.send(announcement, self.engine.full_weights(dtype, self.config.rollout.bucket_bytes))
        return OpResult(columns=NOTHING)

    def close(self) -> None:
        """Free what the generation engine holds outside the process."""
        if self.generation is not None:
            self.generation.close()
