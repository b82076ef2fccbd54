"""Reading columns for arithmetic: finite numbers or a named error, ragged columns cut alike, groups as 0..G-1."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_dist.algorithms.kl import KlEstimator, named_kl
from rlhf_dist.algorithms.ragged import FloatArray, last_counted, row_of_token, spread, sum_rows
from rlhf_dist.algorithms.shaping import kl_penalty
from rlhf_dist.batch import Batch, Column, IntArray
from rlhf_dist.metrics import Mean
from rlhf_dist.missing import is_missing


def numbers(batch: Batch, name: str, *, missing: bool = False) -> FloatArray:
    """The column's values as float32: [B] or flat [N]. `missing`: rewards that are missing are fine, and stay so.

    Raises ValueError naming the column and the rows where a value is NaN, or infinite as float32.
    """
    column = batch[name]
    with np.errstate(over="ignore"):  # said below, with the rows
        values = np.asarray(column.values, dtype=np.float32)
    finite, unknown = np.isfinite(values), is_missing(values)
    if missing:
        finite |= unknown
    elif unknown.any():
        raise ValueError(
            f"column {name!r} has missing rewards ({unknown.sum()} of {batch.num_rows} rows), which this op does not "
            f"take; leave them out before it: batch = drop_missing(batch)"
        )
    if not finite.all():
        where = np.flatnonzero(~finite)
        rows = np.unique(where if column.offsets is None else row_of_token(column.offsets)[where])
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise ValueError(
            f"column {name!r} must hold finite numbers, got {column.values[where[0]]} in {len(rows)} of "
            f"{batch.num_rows} rows (row {shown}); look at the op that wrote {name!r}"
        )
    return values


def present_rows(*rewards: FloatArray) -> IntArray:
    """Rows that have every one of the rewards [B]."""
    found: IntArray = np.flatnonzero(~np.any([is_missing(column) for column in rewards], axis=0))
    return found


def without_missing(batch: Batch, present: IntArray) -> Column:
    """response_mask without any token of rows that are not `present`: no loss, and no place in its divisor."""
    mask, offsets = mask_and_offsets(batch)
    known = np.zeros(batch.num_rows, dtype=mask.dtype)
    known[present] = 1
    return Column((mask * np.repeat(known, np.diff(offsets))).astype(mask.dtype), offsets)


def row_advantages(batch: Batch, advantages: FloatArray, present: IntArray) -> Batch:
    """One advantage a row [B] at each of its tokens, and the mask without rows that are not `present`."""
    mask = without_missing(batch, present)
    assert mask.offsets is not None, "it is ragged"
    spread_out = Column(spread(advantages, mask.offsets, mask.values), mask.offsets)
    return Batch({"advantages": spread_out, "response_mask": mask}, batch.num_rows)


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


def at_last_token(batch: Batch, name: str) -> npt.NDArray[np.float64]:
    """[B, K] of a column [B, T, K]: each row's numbers at its last token; zeros for an empty response.

    Raises ValueError for a column that does not have several numbers a token.
    """
    column = batch[name]
    if column.offsets is None or column.values.ndim != 2:
        raise ValueError(f"column {name!r} must have several numbers per response token")
    found = np.zeros((batch.num_rows, column.values.shape[1]))
    there = column.lengths > 0
    found[there] = column.values[column.offsets[1:][there] - 1]
    return found


def mask_and_offsets(batch: Batch) -> tuple[npt.NDArray[Any], IntArray]:
    """response_mask's flat values [N] and offsets [B + 1]. Raises ValueError if it is not ragged."""
    mask = batch["response_mask"]
    if mask.offsets is None:
        raise ValueError("column 'response_mask' must be ragged: one entry per response token")
    return mask.values, mask.offsets


def groups(batch: Batch, rows: IntArray | None = None) -> IntArray:
    """[B] in 0..G-1: which group a row (each of `rows`) belongs to, groups in order of group_id."""
    named = batch["group_id"].values if rows is None else batch["group_id"].values[rows]
    return np.unique(named, return_inverse=True)[1].astype(np.int64)


def penalty_and_metrics(
    batch: Batch, kl_coef: float, estimator: KlEstimator, cap: float
) -> tuple[FloatArray, dict[str, Mean]]:
    """[N] -kl_coef * KL estimate of (pi_old, pi_ref) at each counted token, and ref_kl, ref_kl_k3 over them.

    Zeros and no metrics without a coefficient: no reference is held then.
    """
    mask, _ = mask_and_offsets(batch)
    if not kl_coef:
        return np.zeros(len(mask), dtype=np.float32), {}
    log_probs, ref_log_probs = tokens(batch, "old_log_probs"), tokens(batch, "ref_log_probs")
    penalty = kl_penalty(log_probs, ref_log_probs, mask, kl_coef, estimator, cap)
    counted = mask > 0
    named = named_kl("ref_kl", log_probs[counted], ref_log_probs[counted], cap)
    return penalty, {name: mean_of(values) for name, values in named.items()}


def penalised_rewards(
    batch: Batch, kl_coef: float, estimator: KlEstimator, cap: float
) -> tuple[FloatArray, dict[str, Mean]]:
    """[B] rewards - kl_coef * KL estimate, summed over counted tokens (k1: log pi(y) - log pi_ref(y)), and metrics."""
    penalty, metrics = penalty_and_metrics(batch, kl_coef, estimator, cap)
    _, offsets = mask_and_offsets(batch)
    return (numbers(batch, "rewards", missing=True) + sum_rows(penalty, offsets)).astype(np.float32), metrics


def mean_of(values: npt.NDArray[Any]) -> Mean:
    """The metric of some numbers."""
    return Mean(float(np.sum(values, dtype=np.float64)), float(len(values)))


def group_metrics(equal: npt.NDArray[np.bool_], group: IntArray) -> dict[str, Mean]:
    """How many groups [G] there are, the share whose rewards are all equal (`zero_variance_groups`), and the share of
    one row (`singleton_groups`), which is among them. `group` [B]: of each row."""
    size = float(len(equal))
    alone = float((np.bincount(group, minlength=len(equal)) == 1).sum())
    return {
        "groups": Mean(size, 0),
        "zero_variance_groups": Mean(float(equal.sum()), size),
        "singleton_groups": Mean(alone, size),
    }


def row_metrics(batch: Batch, present: IntArray) -> dict[str, Mean]:
    """`reward` over the rows that have one (left out where none has), and how many rows have none (`missing_rewards`)
    or no token that counts (`rows_without_tokens`)."""
    rewards = batch["rewards"].values[present]
    mask, offsets = mask_and_offsets(batch)
    return {
        **({"reward": mean_of(rewards)} if len(rewards) else {}),
        "missing_rewards": Mean(float(batch.num_rows - len(present)), 0),
        "rows_without_tokens": Mean(float((last_counted(offsets, mask) < 0).sum()), 0),
    }
