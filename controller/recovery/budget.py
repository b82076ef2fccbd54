"""How often a run may recover, and how long it waits before each time.

    3 in any 100 steps      a machine that fails now and then      goes on, for as long as the run lasts
    3 at one step           a fault that comes back every time     ends the run, with the last one's message

The first recovery begins at once. Those that follow without a new step in between wait, twice as long each time: what
is overloaded or half gone (a node that Ray still counts, a file system that comes back) needs time, not haste.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LONGEST_WAIT_S = 120.0


@dataclass
class Budget:
    """Of one run. Steps count by the furthest the run has been: what is replayed is no progress."""

    retries: int
    """Recoveries in any `window` steps; 0: none at all."""
    window: int
    """Steps."""
    backoff_s: float
    """Wait before the second recovery at one step."""
    _at: list[int] = field(default_factory=list)
    """Furthest step at each recovery."""

    def take(self, furthest: int) -> float | None:
        """Seconds to wait before a recovery of a run that has been as far as `furthest` steps; None: it must end."""
        recent = [step for step in self._at if step > furthest - self.window]
        if len(recent) >= self.retries:
            return None
        again = self._at.count(furthest)
        self._at.append(furthest)
        return 0.0 if again == 0 else min(LONGEST_WAIT_S, self.backoff_s * 2.0 ** (again - 1))
