"""Advantages with standard deviation 1, and mean 0 unless it is to stay, over all counted tokens of the batch."""

from __future__ import annotations

from typing import Literal

from rlhf_dist.algorithms.advantages.whiten import whiten as whiten_formula
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import host_op
from rlhf_dist.transforms.columns import mask_and_offsets, tokens


@host_op(reads=("advantages", "response_mask"), writes=("advantages",), scope="batch")
def whiten(batch: Batch, *, centre: bool = True, eps: float = 1e-8, ddof: Literal[0, 1] = 0) -> Batch:
    """(A - mean) / (std + eps), the std with divisor n - ddof; tokens that do not count become 0.

    `centre=False` leaves the mean where it is.
    """
    mask, offsets = mask_and_offsets(batch)
    whitened = whiten_formula(tokens(batch, "advantages"), mask, centre=centre, eps=eps, ddof=ddof)
    return Batch({"advantages": Column(whitened, offsets)}, batch.num_rows)
