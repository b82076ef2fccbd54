"""Reading columns for arithmetic: finite numbers or a named error, ragged columns cut alike, groups as 0..G-1."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_dist.algorithms.kl import KlEstimator, named_kl
from rlhf_dist.algorithms.ragged import FloatArray, row_of_token, sum_rows
from rlhf_dist.algorithms.shaping import kl_penalty
from rlhf_dist.batch import Batch, IntArray
from rlhf_dist.metrics import Mean


def numbers(batch: Batch, name: str) -> FloatArray:
    """The column's values as float32: [B] or flat [N].

    Raises ValueError naming the column and the rows where a value is NaN, or infinite as float32.
    """
    column = batch[name]
    with np.errstate(over="ignore"):  # said below, with the rows
        values = np.asarray(column.values, dtype=np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        where = np.flatnonzero(~finite)
        rows = np.unique(where if column.offsets is None else row_of_token(column.offsets)[where])
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise ValueError(
            f"column {name!r} must hold finite numbers, got {column.values[where[0]]} in {len(rows)} of "
            f"{batch.num_rows} rows (row {shown}); look at the op that wrote {name!r}"
        )
    return values


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
    return (numbers(batch, "rewards") + sum_rows(penalty, offsets)).astype(np.float32), metrics


def mean_of(values: npt.NDArray[Any]) -> Mean:
    """The metric of some numbers."""
    return Mean(float(np.sum(values, dtype=np.float64)), float(len(values)))


def group_metrics(equal: npt.NDArray[np.bool_]) -> dict[str, Mean]:
    """`zero_variance_groups`: share of the groups [G] whose rewards are all equal, and how many groups there are."""
    size = float(len(equal))
    return {"groups": Mean(size, 0), "zero_variance_groups": Mean(float(equal.sum()), size)}
