"""A process that keeps copies of what ranks of another node hold, for as long as a run lasts. It computes nothing."""

from __future__ import annotations

from typing import Any


class Keeper:
    """Copies by (role, rank), of one step, and of the next while that is being made."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[tuple[str, int], Any]] = {}

    def keep(self, step: int, role: str, rank: int, copy: Any) -> None:
        """Hold a rank's state of `step` steps done."""
        self._kept.setdefault(step, {})[role, rank] = copy

    def forget_but(self, step: int) -> None:
        """Let go of all other steps."""
        self._kept = {step: self._kept.get(step, {})}

    def has(self, step: int) -> set[tuple[str, int]]:
        """Whose copies of `step` are here."""
        return set(self._kept.get(step, {}))

    def give(self, step: int, role: str, rank: int) -> Any:
        """What was kept. Raises KeyError."""
        return self._kept[step][role, rank]
