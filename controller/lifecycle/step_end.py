"""What the controller knows when a step has ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_dist.wire import HeldState


@dataclass(frozen=True, kw_only=True)
class StepEnd:
    """What the controller holds when a step has ended; the processes hold the rest, as long as nothing writes to it."""

    done: int
    """Steps."""
    states: Mapping[str, HeldState]
    written: frozenset[str]
    """What a later step had written by then: of a state, `states` may have what it wrote."""

    @property
    def has_references(self) -> bool:
        """Whether values of `states` lie in the memory of the host pool's processes, and are gone with them."""
        return any(held.ref is not None for held in self.states.values())
