"""Failure domains: one per pool, since a process group whose rank is gone cannot go on without it.

               doubt                      answered
    HEALTHY ---------> SUSPECT --------------------------+
       ^                  |  died, or silent too long    |
       |                  v                              v
       |                DEAD ---> REBUILDING ---> CATCHING_UP
       |                  ^  rebuild   |  up   ^         |
       |                  +------------+-------|---------+   died again
       +-----------------------------------------------verified(incarnation, step)

The transition that must not exist is DEAD -> HEALTHY, and with it every way around a verified sync. A pool that was
built anew answers, generates and scores at once: with the weights its model folder holds, not with those of the step.
What it makes looks right, and nothing after it could tell. So no answer, however often it comes, makes a domain
healthy; only the word that its state is that of the step all domains go back to, given for this incarnation of its
processes. A word about processes that have died since, or about another step, is refused. The same holds for a pool
that never died: once a step is abandoned nobody knows which half of it this pool has done, so SUSPECT has no way back
to HEALTHY either, but the one through CATCHING_UP.

Nothing here talks to anybody. The clock is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum


class Health(StrEnum):
    """What is known of a domain."""

    HEALTHY = "healthy"
    """It serves: its state is that of the step."""
    SUSPECT = "suspect"
    """A step was abandoned; it has not said yet that it is still there."""
    DEAD = "dead"
    """A process of it is gone, or has been silent for too long."""
    REBUILDING = "rebuilding"
    """Its processes are started anew."""
    CATCHING_UP = "catching up"
    """It answers; its state is not that of the step yet."""


class Refused(RuntimeError):
    """A transition that would put a domain to work with a state nobody has verified: a bug of the caller."""


@dataclass
class _Domain:
    health: Health = Health.HEALTHY
    incarnation: int = 0
    """Counts how often its processes were built anew."""
    since_s: float = 0.0


class Domains:
    """The domains of one run."""

    def __init__(self, names: Iterable[str], *, silent_s: float, clock: Callable[[], float]) -> None:
        """silent_s: a suspect that has not answered for so long is dead. clock: seconds, never going back."""
        self._domains = {name: _Domain(since_s=clock()) for name in names}
        self._silent_s, self._clock = silent_s, clock
        self._goal: int | None = None

    def add(self, name: str) -> None:
        """A domain that is healthy, unless it is known."""
        self._domains.setdefault(name, _Domain(since_s=self._clock()))

    def health(self, name: str) -> Health:
        """What is known of a domain."""
        return self._domains[name].health

    def incarnation(self, name: str) -> int:
        """Which of its processes a word is about: that of the first ones is 0."""
        return self._domains[name].incarnation

    def those(self, *states: Health) -> tuple[str, ...]:
        """Domains in one of these states, in the order they were named in."""
        return tuple(name for name, domain in self._domains.items() if domain.health in states)

    @property
    def serving(self) -> bool:
        """Whether a step may run: all are healthy."""
        return len(self.those(Health.HEALTHY)) == len(self._domains)

    # --- what is heard ---------------------------------------------------------------------------------
    def abandoned(self) -> None:
        """The step under way is given up: nobody's state is known any more, no word about an earlier goal counts."""
        self._goal = None
        for name in self.those(Health.HEALTHY, Health.CATCHING_UP):
            self._become(name, Health.SUSPECT)

    def answered(self, name: str) -> None:
        """All its processes are there and have ended what they were at."""
        if self.health(name) is Health.SUSPECT:
            self._become(name, Health.CATCHING_UP)

    def died(self, name: str) -> None:
        """A process of it is gone, or must be given up."""
        if self.health(name) is not Health.DEAD:
            self._become(name, Health.DEAD)

    def tick(self) -> tuple[str, ...]:
        """Give up suspects that have been silent for too long; returns their names."""
        late = tuple(
            name for name in self.those(Health.SUSPECT) if self._clock() - self._domains[name].since_s >= self._silent_s
        )
        for name in late:
            self.died(name)
        return late

    # --- what is done ----------------------------------------------------------------------------------
    def rebuild(self, name: str) -> int:
        """Its processes are about to be started anew; returns the incarnation they will be."""
        if self.health(name) is not Health.DEAD:
            raise Refused(f"pool {name!r} is {self.health(name)}; only a dead one is rebuilt")
        self._domains[name].incarnation += 1
        self._become(name, Health.REBUILDING)
        return self.incarnation(name)

    def up(self, name: str, incarnation: int) -> None:
        """The processes of this incarnation are there. Word of earlier ones is not heard."""
        if self.health(name) is Health.REBUILDING and incarnation == self.incarnation(name):
            self._become(name, Health.CATCHING_UP)

    def goal(self, step: int) -> None:
        """All domains go back to `step` steps done. Raises Refused while one is suspect, dead or rebuilding."""
        if not_there := self.those(Health.SUSPECT, Health.DEAD, Health.REBUILDING):
            raise Refused(f"pools {', '.join(not_there)} cannot go back to step {step} before they are there")
        self._goal = step

    def verified(self, name: str, incarnation: int, step: int) -> None:
        """Its state is that of `step` steps done, and its weights have been compared with their source.

        Raises Refused where that is no proof: another step than the goal, or processes that are no more.
        """
        if self.health(name) is not Health.CATCHING_UP or incarnation != self.incarnation(name) or step != self._goal:
            raise Refused(
                f"pool {name!r} ({self.health(name)}, incarnation {self.incarnation(name)}, going back to step "
                f"{self._goal}) is not made healthy by a sync of incarnation {incarnation} to step {step}"
            )
        self._become(name, Health.HEALTHY)

    def _become(self, name: str, health: Health) -> None:
        self._domains[name].health, self._domains[name].since_s = health, self._clock()
