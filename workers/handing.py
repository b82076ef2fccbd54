"""What calls hand over before they are done, for the controller to fetch.

the op's threads: give(ticket, piece, reply)     a thread of its own: take(ticket, wait_s) -> all that is there by then
"""

from __future__ import annotations

import threading

from rlhf_dist.wire import Reply

KEPT = 16
"""Calls of which something is kept: one that was interrupted (`placement.interrupt`) goes on after others."""


class Handing:
    """By ticket, since the episodes of an interrupted call may end while another call runs."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ticket, self._over = "", True
        self._made: dict[str, list[tuple[int, Reply]]] = {}

    def begin(self, ticket: str) -> None:
        """A call begins, or goes on."""
        with self._changed:
            self._made[ticket] = self._made.pop(ticket, [])
            while len(self._made) > KEPT:
                del self._made[next(iter(self._made))]
            self._ticket, self._over = ticket, False
            self._changed.notify_all()

    def give(self, ticket: str, piece: int, reply: Reply) -> None:
        """What became of the rows of a piece; of a call that is forgotten, nothing."""
        with self._changed:
            if ticket in self._made:
                self._made[ticket].append((piece, reply))
                self._changed.notify_all()

    def end(self) -> None:
        """The call under way is over: its reply has everything."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def forget(self) -> None:
        """All calls are given up."""
        with self._changed:
            self._made.clear()

    def take(self, ticket: str, wait_s: float) -> list[tuple[int, Reply]]:
        """What the call with this ticket has given since the last time; nothing where that is not within `wait_s`, or
        the call is not under way any more. One that has not begun is waited for."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._made.get(ticket)) or self._is_over(ticket), wait_s)
            made = self._made.get(ticket, [])
            if made:
                self._made[ticket] = []
            return made

    def _is_over(self, ticket: str) -> bool:
        return ticket in self._made and (ticket != self._ticket or self._over)
