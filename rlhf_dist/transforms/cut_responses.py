"""Responses that the token limit cut: left out of the loss, or charged for it. `finished` says which are not."""

from __future__ import annotations

import numpy as np

from rlhf_dist.algorithms.ragged import spread
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import Mean
from rlhf_dist.transforms.columns import mask_and_offsets, numbers


@host_op(reads=("finished", "response_mask"), writes=("response_mask",), scope="rows")
def mask_cut_responses(batch: Batch) -> Batch:
    """No token of a response that was cut counts: it has no loss, while its reward stays in its group's baseline."""
    mask, offsets = mask_and_offsets(batch)
    kept = spread(batch["finished"].values, offsets, mask).astype(mask.dtype)
    return Batch({"response_mask": Column(kept, offsets)}, batch.num_rows)


@host_op(reads=("finished", "rewards"), writes=("rewards",), scope="rows", missing=True)
def penalise_cut_responses(batch: Batch, *, penalty: float) -> HostResult:
    """`rewards` less `penalty` (reward units) for responses that were cut. Raises ValueError for a negative penalty."""
    if not penalty >= 0:
        raise ValueError(f"the penalty of a cut response must be >= 0, got {penalty}")
    cut = batch["finished"].values == 0
    rewards = numbers(batch, "rewards", missing=True) - np.float32(penalty) * cut
    return HostResult(
        columns=Batch({"rewards": Column(rewards.astype(np.float32))}, batch.num_rows),
        metrics={"penalised": Mean(float(cut.sum()), float(len(cut)))},
    )
