"""What any model says for others to read: hidden states, likely tokens, heads of its own."""

from __future__ import annotations

from rlhf_dist.batch import Batch
from rlhf_dist.wire import Call, OpResult
from workers.engines.training.interface import TrainingEngine


class TrunkOutputs:
    """Implements `rlhf_dist.roles.OfTrunk` for a worker with an engine."""

    engine: TrainingEngine
    base: bool = False
    """Its model is the engine's without its adapters."""

    def compute_hidden(self, batch: Batch, call: Call) -> OpResult:
        """The last states that response tokens are predicted from."""
        return OpResult(columns=Batch(self.engine.forward(batch, ("hidden",), base=self.base), batch.num_rows))

    def compute_heads(self, batch: Batch, call: Call, *, names: tuple[str, ...]) -> OpResult:
        """What heads of the role's own say."""
        found = self.engine.forward(batch, tuple(f"heads.{name}" for name in names), base=self.base)
        return OpResult(columns=Batch({name: found[f"heads.{name}"] for name in names}, batch.num_rows))


class LanguageModelOutputs(TrunkOutputs):
    """The same, and what is said over the vocabulary, for a language model."""

    temperature: float

    def compute_logits(self, batch: Batch, call: Call) -> OpResult:
        """Logits of the response tokens, and the largest before each."""
        return OpResult(columns=Batch(self.engine.forward(batch, ("logits",), base=self.base), batch.num_rows))

    def compute_top_k(self, batch: Batch, call: Call, *, k: int, prefix: str) -> OpResult:
        """The `k` likeliest tokens before each response token."""
        found = self.engine.forward(batch, (f"top_k.{k}",), self.temperature, base=self.base)
        columns = {f"{prefix}_{what}": found[f"top_{what}"] for what in ("ids", "log_probs", "log_rest")}
        return OpResult(columns=Batch(columns, batch.num_rows))
