"""Which rows' episodes an op keeps of those it plays, and what ends the others: over-sampling, and the step's deadline.

    an episode begins a turn ──> its row cannot be among the first any more ──> its episodes end as `surplus`
    an episode is over ────────> its row is: the last that would be kept may be another one; look at all others
    `step_seconds` are over ───> all that are not over, or not begun, end as `step_deadline`

A row's place is (episodes lost, turns of its longest episode, row), or with `first="time"` (episodes lost, rows that
were over before it, row). None of these gets less while the row is played, so that a row which stands behind the last
one that is kept stands there for good: what is kept by turns depends on what was drawn and on which rows this rank
has, and not on when it was drawn.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from workers.episodes.chat import EpisodeEnded
from workers.episodes.leaves import Episode

First = Literal["turns", "time"]


@dataclass(eq=False)
class _Row:
    left: int
    """Episodes that are not over."""
    lost: int = 0
    turns: int = 0
    """Of the longest, so far."""
    trains: bool = False
    over_before: int | None = None
    """Rows that were over when it was; None: it is not."""
    stops: dict[int, asyncio.Future[EpisodeEnded]] = field(default_factory=dict)
    """Episode -> what ends it from outside."""


class FirstGroups:
    """Watches the episodes of one op on one rank; all calls in the episodes' thread."""

    def __init__(
        self, rows: int, n: int, *, wanted: int | None, first: First = "turns", step_seconds: float | None = None
    ) -> None:
        """n: episodes of each row, numbered row by row. wanted: rows that are kept; None: all."""
        self._rows, self._n, self._wanted, self._first = [_Row(n) for _ in range(rows)], n, wanted, first
        self._step_seconds, self._begun = step_seconds, False
        self._places: list[tuple[int, int, int]] = []
        """Of rows that are over and have something to train on, ascending."""
        self._over = 0
        self._going_on = set(range(rows))
        """Rows that are not over, and may be kept."""
        self._late: EpisodeEnded | None = None

    def stop_of(self, number: int) -> asyncio.Future[EpisodeEnded]:
        """What ends an episode, which is about to begin, from outside."""
        loop = asyncio.get_running_loop()
        if not self._begun and self._step_seconds is not None:
            loop.call_later(self._step_seconds, self._end_step)
        self._begun = True
        stop: asyncio.Future[EpisodeEnded] = loop.create_future()
        self._rows[number // self._n].stops[number] = stop
        if self._late is not None:
            stop.set_result(self._late)
        self._look(number // self._n)
        return stop

    def begins(self, number: int, turns: int) -> None:
        """An episode begins a turn, the last of `turns` so far."""
        row = self._rows[number // self._n]
        if turns > row.turns:
            row.turns = turns
            self._look(number // self._n)

    def over(self, number: int, leaves: Sequence[Episode]) -> None:
        """An episode is over, and became these rows of the batch."""
        at = number // self._n
        row, own = self._rows[at], [leaf for leaf in leaves if not leaf.speaker]
        row.left -= 1
        row.lost += not all(leaf.trains for leaf in own)
        row.trains |= any(leaf.trains for leaf in own)
        row.turns = max(row.turns, *(leaf.chat.turns for leaf in own))
        if row.left:
            self._look(at)
            return
        row.over_before = self._over
        self._over += 1
        if row.trains:
            insort(self._places, self._place(at))
        self._going_on.discard(at)
        if self._wanted is not None and len(self._places) >= self._wanted:
            for other in list(self._going_on):
                self._look(other)

    def chosen(self, leaves: Sequence[Episode]) -> list[Episode]:
        """All that were played, those of rows that are not kept as surplus."""
        if self._wanted is None:
            return list(leaves)
        kept = {row for *_, row in self._places[: self._wanted]}
        surplus = self._surplus()
        return [
            leaf
            if leaf.number // self._n in kept or not leaf.trains
            else replace(leaf, outcome=surplus.outcome, detail=surplus.detail)
            for leaf in leaves
        ]

    def _place(self, at: int) -> tuple[int, int, int]:
        """Of a row that is not over: the first that it may still have."""
        row = self._rows[at]
        before = self._over if row.over_before is None else row.over_before
        return row.lost, row.turns if self._first == "turns" else before, at

    def _look(self, at: int) -> None:
        """End the row's episodes where it can no longer be among those that are kept."""
        row = self._rows[at]
        if self._wanted is None or row.left == 0 or len(self._places) < self._wanted:
            return
        if self._wanted == 0 or self._place(at) > self._places[self._wanted - 1]:
            self._going_on.discard(at)
            self._end(row, self._surplus())

    def _end_step(self) -> None:
        self._late = EpisodeEnded(
            "step_deadline", f"not all over within {self._step_seconds:g} s (EpisodeLimits.step_seconds)"
        )
        for row in self._rows:
            self._end(row, self._late)

    def _end(self, row: _Row, ended: EpisodeEnded) -> None:
        for stop in row.stops.values():
            if not stop.done():
                stop.set_result(ended)

    def _surplus(self) -> EpisodeEnded:
        return EpisodeEnded("surplus", f"its row is not among the first {self._wanted} of this rank (groups=)")
