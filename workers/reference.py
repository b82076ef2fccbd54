"""The reference: a frozen policy, whose weights change where a recipe writes them."""

from __future__ import annotations

from rlhf_dist.batch import Batch
from rlhf_dist.config import ReferenceConfig
from rlhf_dist.wire import Call, OpResult, WorkerContext
from workers.engines.build import new_training_engine
from workers.engines.training import TrainingEngine
from workers.trained_role import TrainedRole


class ReferenceWorker(TrainedRole):
    """One rank of the reference. Implements `rlhf_dist.roles.Reference`."""

    def __init__(
        self, context: WorkerContext, config: ReferenceConfig, temperature: float = 1.0, base_of: str | None = None
    ) -> None:
        """`temperature`: the actor's, so that both log-probs are of the same kind. `base_of`: a role of this process
        whose model, without its adapters, is the reference: it is held once."""
        self.temperature, self.base = temperature, base_of is not None
        self.engine: TrainingEngine
        self.remarks: tuple[str, ...] = ()
        if base_of:
            self.engine = context.peers[base_of].engine
            return
        super().__init__(context, new_training_engine(config.model, config.engine, None, "policy", context), None)

    def compute_ref_log_prob(self, batch: Batch, call: Call) -> OpResult:
        """Log-probs of the responses under the frozen policy."""
        found = self.engine.forward(batch, ("log_probs",), self.temperature, base=self.base)
        return OpResult(columns=Batch({"ref_log_probs": found["log_probs"]}, batch.num_rows))
