"""A language model: a training engine and, where it generates in this pool, a generation engine beside it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from rlhf_dist.algorithms.kl import LOG_RATIO_LIMIT, named_kl
from rlhf_dist.algorithms.ragged import FloatArray
from rlhf_dist.batch import Batch
from rlhf_dist.config import LanguageModelConfig
from rlhf_dist.failure import FailureKind
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.reshard.groups import colocated_axes
from rlhf_dist.wire import Bridge, Call, OpResult, WorkerContext
from workers.asked import Asker, encode_rows
from workers.build_engines import new_training_engine
from workers.engines.training.interface import TrainingEngine
from workers.model_outputs import LanguageModelOutputs
from workers.reshard.colocated import ColocatedSync
from workers.reshard.separate import TrainingEnd
from workers.reshard.sync import SyncReport
from workers.rollout import RolloutWorker, sync_metrics
from workers.trained_role import TrainedRole
from workers.weight_sets import NOTHING

RATIO_TOLERANCE = {"float32": 0.01, "bfloat16": 0.5}
"""Rollout dtype -> largest mean |ratio - 1|. Measured: 5e-7 in float32, 0.06 to 0.1 (with outliers) in bfloat16."""


class OffPolicy(RuntimeError):
    """On-policy rows were not sampled by the policy that is trained."""

    failure_kind = FailureKind.NUMERICS


class LanguageModelWorker(LanguageModelOutputs, TrainedRole):
    """One rank of a language model. Implements `rlhf_dist.roles.LanguageModel` and its kinds.

    A role that is only ever asked to generate has a `RolloutWorker` and none of this.
    """

    def __init__(
        self,
        context: WorkerContext,
        config: LanguageModelConfig,
        trained: bool = True,
        generates: bool = True,
        temperature: float | None = None,
        on_policy: Collection[str] = (),
        base_of: str | None = None,
    ) -> None:
        """trained: it has an optimizer. generates: in this process, beside the training engine. temperature: of the
        log-probs; None: of sampling. on_policy: nodes whose rows were sampled with the weights held, which is checked.
        base_of: a role of this process whose model, without its adapters, is this one's: it is held once.

        The generation engine comes up after the training engine: it reuses the process group that is there by then.
        """
        optimizer = config.optimizer if trained else None
        engine: TrainingEngine = (
            new_training_engine(config.model, config.engine, optimizer, "policy", context)
            if base_of is None
            else context.peers[base_of].engine
        )
        spoken = config.rollout.temperature if temperature is None else temperature
        super().__init__(context, engine, optimizer, spoken, shared=base_of is not None)
        self.config, self.on_policy, self.base = config, on_policy, base_of is not None
        self.asker = Asker(config.model.path, context)
        self.generation: RolloutWorker | None = None
        if generates:
            axes = colocated_axes(config, context.nodes or (0,) * context.world)
            self.generation = RolloutWorker(context, config, 0 if trained else None, axes=axes)
            self.sync = ColocatedSync(self.engine, self.generation.engine, config.rollout, context)

    def generate_sequences(self, batch: Batch, call: Call, **settings: Any) -> OpResult:
        """`n` responses a prompt; settings: see `RolloutWorker.generate_sequences`."""
        assert self.generation is not None, "the recipe was planned without generation in this pool"
        if self.sync.dropped:  # what is generated now, in an evaluation, was not in the plan of a step
            self._sync_weights()
        return self.generation.generate_sequences(batch, call, **settings)

    def run_episodes(self, batch: Batch, call: Call, **settings: Any) -> OpResult:
        """Episodes of an environment; settings: see `RolloutWorker.run_episodes`."""
        assert self.generation is not None, "the recipe was planned without generation in this pool"
        if self.sync.dropped:
            self._sync_weights()
        return self.generation.run_episodes(batch, call, **settings)

    def encode(self, batch: Batch, call: Call, **settings: Any) -> OpResult:
        """Rows under other prompts; settings: see `asked.encode_rows`."""
        return encode_rows(self.asker, self.config.rollout, batch, key=f"{self.context.role}.rollout", **settings)

    def compute_log_prob(self, batch: Batch, call: Call) -> OpResult:
        """Log-probs and entropy under the training engine."""
        found = self.engine.forward(batch, ("log_probs", "entropy"), self.temperature, base=self.base)
        drawn = batch["turn"].values >= 0 if "turn" in batch else slice(None)  # of an episode, not what was said to it
        entropy = found["entropy"].values[drawn]
        metrics: Metrics = {"entropy": Mean(float(entropy.sum(dtype=np.float64)), float(len(entropy)))}
        if "rollout_log_probs" in batch:
            metrics |= _mismatch(found["log_probs"].values[drawn], batch["rollout_log_probs"].values[drawn])
            self._check_ratio(metrics, call)
        return OpResult(columns=Batch(found, batch.num_rows), metrics=metrics)

    def compute_ref_log_prob(self, batch: Batch, call: Call) -> OpResult:
        """Log-probs alone."""
        found = self.engine.forward(batch, ("log_probs",), self.temperature, base=self.base)
        return OpResult(columns=Batch({"ref_log_probs": found["log_probs"]}, batch.num_rows))

    def update(self, given: Batch | tuple[Batch, ...], call: Call, **settings: Any) -> OpResult:
        """Optimizer steps; settings: see `TrainedRole.update`."""
        result = super().update(given, call, **settings)
        self._check_ratio(result.metrics, call)
        return result

    update_actor = update

    def _check_ratio(self, metrics: Metrics, call: Call) -> None:
        """Raise OffPolicy where the policy that sampled is not the one that is trained, and should be."""
        # Of an update with several terms each has its own.
        found = [one.value for name, one in metrics.items() if name.rpartition("/")[2] == "rollout_ratio_error"]
        error = max(found, default=0.0)
        tolerance = self.config.rollout.ratio_tolerance or RATIO_TOLERANCE[self.config.rollout.dtype]
        if call.node in self.on_policy and error > tolerance:
            raise OffPolicy(
                f"the ratio of recomputed to sampled probabilities must be 1 on-policy, its mean error is {error:.3g} "
                f"> {tolerance:g}; raise {self.context.role}.rollout.ratio_tolerance if generation's dtype or kernels "
                "explain it"
            )

    def reshard(self, batch: Batch, call: Call) -> OpResult:
        """Move the trained weights to the generation engine, verified: version, count, per-parameter checksums."""
        assert self.generation is not None, "the recipe was planned without generation in this pool"
        report = self._sync_weights()
        self.generation.weights_step = call.step + 1
        return OpResult(columns=NOTHING, metrics=sync_metrics(report) if self.context.rank == 0 else {})

    def _sync_weights(self) -> SyncReport:
        return self.sync.run(must_change=self.must_change())

    def connect(self, bridge: Bridge) -> None:
        """Meet the ranks that generate, in a pool of their own; all of both pools do."""
        device = torch.device(self.context.device)
        self.end = TrainingEnd(self.engine, self.config.rollout, bridge, self.context.rank, device)
        self.memory.add_sync(
            f"{self.context.role}.sync",
            {self.context.role: "parameters"},
            overwrites=False,
            buckets=2 * self.end.bucket_bytes,
        )

    def send_weights(self, batch: Batch, call: Call) -> OpResult:
        """The same move to another pool, whose ranks receive and verify meanwhile."""
        self.memory.turn(f"{self.context.role}.sync")
        self.end.run(must_change=self.must_change())
        return OpResult(columns=NOTHING)

    def interrupt(self) -> None:
        """Stop generating, if something is generated here; called from another thread."""
        if self.generation is not None:
            self.generation.interrupt()

    def abandon(self) -> None:
        """See `RolloutWorker.abandon`."""
        if self.generation is not None:
            self.generation.abandon()

    def close(self) -> None:
        """Free what the generation engine holds outside the process, too."""
        super().close()
        if self.generation is not None:
            self.generation.close()


def _mismatch(log_probs: FloatArray, rollout_log_probs: FloatArray) -> Metrics:
    """How far recomputed log-probs [T] are from sampled ones: see `losses/correction.py`."""
    log_rho = log_probs.astype(np.float64) - rollout_log_probs
    ratio = np.exp(log_rho.clip(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    per_token = {
        "rollout_mismatch": np.abs(log_rho),
        "rollout_ratio": ratio,
        "rollout_ratio_error": np.abs(ratio - 1),
        **named_kl("rollout_kl", rollout_log_probs.astype(np.float64), log_probs.astype(np.float64)),
    }
    return {name: Mean(float(values.sum()), float(len(values))) for name, values in per_token.items()}
