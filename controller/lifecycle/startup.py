"""How long a run takes to its first step, by part: what the display is told, with a clock.

command and checks | Ray | processes | imports | engines | checkpoint | sync | evaluation | first step
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

PARTS = {
    "this process": "processes",
    "Ray": "Ray",
    "processes": "processes",
    "imports": "imports",
    "checkpoint": "checkpoint",
    "first weight sync": "sync",
    "evaluation": "evaluation",
    "first step": "first step",
}
"""What a phase is called -> its part; all others are engines that are built and connected."""
ENGINES = "engines"


class _Display(Protocol):
    def step(self, step: int, metrics: Mapping[str, float], node_seconds: Mapping[str, float]) -> None: ...

    def phase(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...


class StartUp:
    """A display that keeps the seconds between what it is told, up to the end of the first step."""

    def __init__(self, display: _Display, began_s: float | None = None) -> None:
        """began_s: when the command was started, seconds since 1970; None: nobody knows."""
        self._display = display
        self.seconds: dict[str, float] = {}
        """Part -> seconds, in order."""
        self._part: str | None = None
        self._since = time.monotonic()
        if began_s is not None:
            self.seconds["command and checks"] = max(time.time() - began_s, 0.0)

    def phase(self, text: str) -> None:
        """Something begins."""
        if self._part != "":
            self._close(PARTS.get(text.partition(":")[0], ENGINES))
        self._display.phase(text)

    def step(self, step: int, metrics: Mapping[str, float], node_seconds: Mapping[str, float]) -> None:
        """A step is finished; with the first the start-up is over."""
        self._close("")
        self._display.step(step, metrics, node_seconds)

    def note(self, text: str) -> None:
        """A line for people."""
        self._display.note(text)

    def _close(self, following: str) -> None:
        """The part under way ends; no part follows where the start-up is over."""
        now = time.monotonic()
        if self._part:
            self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = ("" if self._part == "" else following), now
