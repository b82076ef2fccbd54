"""A reward that is not known, in a column of numbers: a NaN of its own, which is told from one that arithmetic made.

A row's reward is missing where its function failed and the settings let the run go on (`failed_reward: missing`). What
is computed from it is missing, too (processors carry a NaN's bits through sums and products); it enters no baseline,
mean or comparison, and the row is not trained on. An op that does not say that it takes missing numbers is not given
any (`refuse_missing`). Any other NaN stays an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from rlhf_dist.batch import Batch

_BITS = 0x7FC04D53
_SIGN = 0x80000000
MISSING: np.float32 = np.array([_BITS], dtype=np.uint32).view(np.float32)[0]
"""The reward of a row that has none."""


def is_missing(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """[N]: which values are missing, whatever their sign."""
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    found: npt.NDArray[np.bool_] = (bits & ~np.uint32(_SIGN)) == np.uint32(_BITS)
    return found


def refuse_missing(op: str, batch: Batch, reads: Iterable[str], *, can_declare: bool = True) -> None:
    """Raises ValueError where a column of one number a row, of those that `op` reads, has missing ones. can_declare:
    an op of this kind may say that it takes them."""
    for name in reads:
        column = batch[name]
        if batch.num_rows and column.offsets is None and column.values.dtype == np.float32:
            lost = int(is_missing(column.values).reshape(batch.num_rows, -1).any(axis=1).sum())
            if lost:
                declare = ", or declare it with missing=True" if can_declare else ""
                raise ValueError(
                    f"{op} reads column {name!r}, which is missing in {lost} of {batch.num_rows} rows, and does not "
                    "say what it makes of that; leave such rows out before it (batch = drop_missing(batch) where it is "
                    f"rewards){declare}"
                )
