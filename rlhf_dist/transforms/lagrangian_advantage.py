"""Safe RLHF: one advantage from the reward's and the cost's."""

from __future__ import annotations

from rlhf_dist.algorithms.lagrange import combined_advantages
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import host_op
from rlhf_dist.transforms.columns import numbers


@host_op(reads=("advantages", "cost_advantages"), writes=("advantages",), scope="rows")
def lagrangian_advantage(batch: Batch, *, lam: float) -> Batch:
    """(advantages - lam * cost_advantages) / (1 + lam), `lam` the multiplier itself (not its logarithm)."""
    combined = combined_advantages(numbers(batch, "advantages"), numbers(batch, "cost_advantages"), lam)
    return Batch({"advantages": Column(combined, batch["advantages"].offsets)}, batch.num_rows)
