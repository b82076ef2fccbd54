"""What becomes of the rows of a piece, handed over once the last of it is there, while others are still made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

from rlhf_dist.batch import IntArray

Made = TypeVar("Made")


class Gathered(Generic[Made]):
    """Counts what is there, by piece; all calls in one thread."""

    def __init__(self, of_row: IntArray, n: int, hand: Callable[[int, list[tuple[int, Made]]], None]) -> None:
        """of_row: [B] the piece of each row. n: responses or episodes of each row, numbered row by row. hand: is given
        a piece and all that was made of it, with their numbers and in that order."""
        self._of_row, self._n, self._hand = of_row, n, hand
        pieces, rows = np.unique(of_row, return_counts=True)
        self._wanted = {int(piece): int(count) * n for piece, count in zip(pieces, rows, strict=True)}
        self._made: dict[int, list[tuple[int, Made]]] = {piece: [] for piece in self._wanted}

    def over(self, number: int, made: Made) -> None:
        """One of them is over."""
        piece = int(self._of_row[number // self._n])
        self._made[piece].append((number, made))
        if len(self._made[piece]) == self._wanted[piece]:
            self._hand(piece, sorted(self._made.pop(piece), key=lambda one: one[0]))
