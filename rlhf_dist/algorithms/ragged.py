"""Flat ragged arrays: `values` [N] of all rows one after the other, `offsets` [B + 1], as batch columns are."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_dist.batch import IntArray

FloatArray = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


def row_of_token(offsets: IntArray) -> IntArray:
    """[N]: the row each token belongs to."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def sum_rows(values: npt.NDArray[Any], offsets: IntArray) -> Float64Array:
    """[N] -> [B]: sum of each row in float64; 0 for an empty row."""
    rows = len(offsets) - 1
    sums = np.zeros(rows, dtype=np.float64)
    np.add.at(sums, row_of_token(offsets), values)
    return sums


def spread(per_row: npt.NDArray[Any], offsets: IntArray, mask: npt.NDArray[Any]) -> FloatArray:
    """[B] -> [N]: each row's number at its counted tokens, 0 at the others."""
    return np.where(mask > 0, np.repeat(per_row, np.diff(offsets)), 0.0).astype(np.float32)


def last_counted(offsets: IntArray, mask: npt.NDArray[Any]) -> IntArray:
    """[B]: position in [0, N) of each row's last token with mask > 0; -1 for a row without any."""
    last = np.full(len(offsets) - 1, -1, dtype=np.int64)
    counted = np.flatnonzero(mask > 0)
    np.maximum.at(last, row_of_token(offsets)[counted], counted)
    return last
