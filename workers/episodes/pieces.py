"""Episodes of a piece of the rows, handed over once the last of them is over, while others are still played."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlhf_dist.batch import IntArray
from workers.episodes.leaves import Episode

Hand = Callable[[int, Sequence[Episode]], None]
"""(piece, all that its episodes became, in the order of rows and copies)"""


class EpisodePieces:
    """Counts what is over; all calls in the episodes' thread."""

    def __init__(self, of_row: IntArray, n: int, hand: Hand) -> None:
        """of_row: [B] the piece of each row. n: episodes of each row, numbered row by row."""
        self._of_row, self._n, self._hand = of_row, n, hand
        pieces, rows = np.unique(of_row, return_counts=True)
        self._left = {int(piece): int(count) * n for piece, count in zip(pieces, rows, strict=True)}
        self._over: dict[int, list[tuple[int, Sequence[Episode]]]] = {piece: [] for piece in self._left}

    def over(self, number: int, leaves: Sequence[Episode]) -> None:
        """An episode is over, and became these rows of the batch."""
        piece = int(self._of_row[number // self._n])
        self._over[piece].append((number, leaves))
        if len(self._over[piece]) == self._left[piece]:
            whole = sorted(self._over.pop(piece), key=lambda one: one[0])
            self._hand(piece, [leaf for _, some in whole for leaf in some])
