"""One number for all rows of a batch, before another is put beside it: whose rows they are, which side of a pair."""

from __future__ import annotations

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import host_op
from rlhf_dist.schema import COLUMNS


@host_op(reads=("group_id",), writes=lambda settings: (settings["column"],))
def mark_rows(batch: Batch, *, column: str, number: float) -> Batch:
    """`number` for every row, as `column`'s own dtype (`label` is int8), or float32 where it has none."""
    dtype = COLUMNS[column].dtype if column in COLUMNS else "float32"
    return Batch({column: Column(np.full(batch.num_rows, number, dtype))}, batch.num_rows)
