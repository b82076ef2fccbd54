"""Parts the rows of episodes in which several roles speak by who drew them."""

from __future__ import annotations

import numpy as np

from rlhf_dist.batch import Batch
from rlhf_dist.dataflow.host import HostResult, host_op


@host_op(reads=("speaker",), rows="drop")
def spoken_by(batch: Batch, *, name: str) -> HostResult:
    """The rows that one speaker drew: the role whose op played the episodes, or a name among its `speakers`."""
    keep = np.flatnonzero(np.array([one == name for one in batch["speaker"].rows()], dtype=bool))
    return HostResult(columns=Batch({}, len(keep)), keep=keep)
