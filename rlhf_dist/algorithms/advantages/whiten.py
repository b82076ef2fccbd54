"""Whitening: standard deviation 1 over counted tokens, and mean 0 unless the mean is to stay."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rlhf_dist.algorithms.ragged import FloatArray


def whiten(
    values: FloatArray, mask: npt.NDArray[Any], *, centre: bool = True, eps: float = 1e-8, ddof: Literal[0, 1] = 0
) -> FloatArray:
    """(x - mean) / (std + eps) over the entries with mask > 0; the others become 0. [N] -> [N].

    The std has divisor n - ddof. `centre=False` leaves the mean where it is: the result plus the mean. Counted
    entries that are all equal have no spread to divide by: they become 0, or stay as they are without `centre`.
    """
    counted = mask > 0
    x = values[counted].astype(np.float64)
    if len(x) == 0 or x.min() == x.max():
        scaled = np.zeros_like(x) if centre else x
    else:
        mean = x.mean()
        scaled = (x - mean) / (x.std(ddof=ddof) + eps) + (0.0 if centre else mean)
    whitened = np.zeros(len(values), dtype=np.float32)
    whitened[counted] = scaled
    return whitened
