"""What a call hands over before it is done, for the controller to fetch.

the op's threads: give(piece, reply)     a thread of its own: take(ticket, wait_s) -> all that is there by then
"""

from __future__ import annotations

import threading
from collections import deque

from rlhf_dist.wire import Reply


class Handing:
    """One call's at a time. A process that is called again with the same ticket goes on (`placement.interrupt`)."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ticket, self._over = "", True
        self._gone = deque[str](maxlen=16)
        """Calls before this one: who still asks about them is not to wait."""
        self._made: list[tuple[int, Reply]] = []

    def begin(self, ticket: str) -> None:
        """A call begins."""
        with self._changed:
            if ticket != self._ticket:
                self._gone.append(self._ticket)
                self._made = []
            self._ticket, self._over = ticket, False
            self._changed.notify_all()

    def give(self, piece: int, reply: Reply) -> None:
        """What became of the rows of a piece."""
        with self._changed:
            self._made.append((piece, reply))
            self._changed.notify_all()

    def end(self) -> None:
        """The call is over: its reply has everything."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def take(self, ticket: str, wait_s: float) -> list[tuple[int, Reply]]:
        """What the call with this ticket has given since the last time; nothing where that is not within `wait_s`, or
        the call has ended. One that has not begun is waited for."""
        with self._changed:
            self._changed.wait_for(lambda: ticket in self._gone or self._has_news_of(ticket), wait_s)
            if self._ticket != ticket:
                return []
            made, self._made = self._made, []
            return made

    def _has_news_of(self, ticket: str) -> bool:
        return self._ticket == ticket and (bool(self._made) or self._over)
