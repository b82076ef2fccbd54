"""Reading columns for arithmetic: finite numbers or a named error, ragged columns cut alike, groups as 0..G-1."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_dist.algorithms.ragged import FloatArray, row_of_token, sum_rows
from rlhf_dist.batch import Batch, IntArray


def numbers(batch: Batch, name: str) -> FloatArray:
    """The column's values as float32: [B] or flat [N].

    Raises ValueError naming the column and the rows where a value is NaN or infinite.
    """
    column = batch[name]
    finite = np.isfinite(column.values)
    if not finite.all():
        where = np.flatnonzero(~finite)
        rows = np.unique(where if column.offsets is None else row_of_token(column.offsets)[where])
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise ValueError(
            f"column {name!r} must hold finite numbers, got {column.values[where[0]]} in {len(rows)} of "
            f"{batch.num_rows} rows (row {shown}); look at the op that wrote {name!r}"
        )
    return np.asarray(column.values, dtype=np.float32)


def tokens(batch: Batch, name: str) -> FloatArray:
    """A per-token column's flat values [N], cut into rows as response_mask is.

    Raises ValueError where they are not finite, or the column's rows have other lengths than the responses.
    """
    if not np.array_equal(batch[name].lengths, batch["response_mask"].lengths):
        row = int(np.flatnonzero(batch[name].lengths != batch["response_mask"].lengths)[0])
        raise ValueError(
            f"column {name!r} must have one entry per response token, got {batch[name].lengths[row]} for the "
            f"{batch['response_mask'].lengths[row]} tokens of row {row}"
        )
    return numbers(batch, name)


def mask_and_offsets(batch: Batch) -> tuple[npt.NDArray[Any], IntArray]:
    """response_mask's flat values [N] and offsets [B + 1]. Raises ValueError if it is not ragged."""
    mask = batch["response_mask"]
    if mask.offsets is None:
        raise ValueError("column 'response_mask' must be ragged: one entry per response token")
    return mask.values, mask.offsets


def groups(batch: Batch) -> IntArray:
    """[B] in 0..G-1: which group a row belongs to, groups in order of group_id."""
    return np.unique(batch["group_id"].values, return_inverse=True)[1].astype(np.int64)


def penalised_rewards(batch: Batch, kl_coef: float) -> FloatArray:
    """[B]: rewards - kl_coef * (log pi(y) - log pi_ref(y)), the log-probs summed over counted tokens."""
    rewards = numbers(batch, "rewards")
    if not kl_coef:
        return rewards
    mask, offsets = mask_and_offsets(batch)
    log_ratio = np.where(mask > 0, tokens(batch, "old_log_probs") - tokens(batch, "ref_log_probs"), 0.0)
    return (rewards - kl_coef * sum_rows(log_ratio, offsets)).astype(np.float32)
