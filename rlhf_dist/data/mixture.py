"""Which part of a mixture the n-th row of a run comes from, and which of the part's rows it is.

Weights become whole numbers of rows in a cycle of CYCLE positions, spread evenly over it, so that every step has
nearly the same shares. All cycles are alike: the answer is arithmetic on n, nothing is drawn and nothing is kept.

    weights 3 : 1    a a b a   a a b a   ...        draw of part a at position 5: the 4th
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_dist.batch import IntArray

CYCLE = 4096


class Mixture:
    """The order in which parts take turns."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Raises ValueError for a weight too small to have one row in a cycle."""
        self.counts = _whole(weights)
        """[parts] rows of each part in a cycle."""
        if not self.counts.all():
            share = min(weights) / sum(weights)
            raise ValueError(f"a part of a mixture must be at least 1/{CYCLE} of all rows, got {share:.2g}")
        due = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        part = np.repeat(np.arange(len(self.counts)), self.counts)
        self._part = part[np.argsort(due, kind="stable")]
        taken = np.cumsum(self._part[:, None] == np.arange(len(self.counts)), axis=0)
        self._before = taken[np.arange(CYCLE), self._part] - 1

    def at(self, position: IntArray) -> tuple[IntArray, IntArray]:
        """(part, how many rows of that part came before) at each position of the run."""
        cycle, within = position // CYCLE, position % CYCLE
        part = self._part[within]
        return part, cycle * self.counts[part] + self._before[within]

    def drawn(self, position: int) -> IntArray:
        """[parts] rows that each part has given before `position`."""
        cycles, within = divmod(position, CYCLE)
        return cycles * self.counts + np.bincount(self._part[:within], minlength=len(self.counts))


def _whole(weights: Sequence[float]) -> IntArray:
    """Shares of CYCLE as whole numbers, the largest remainders rounded up."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * CYCLE
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")[: CYCLE - counts.sum()]
    counts[largest] += 1
    return counts
