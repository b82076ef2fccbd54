"""What the controller holds of states: their numbers, and references to what else they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controller.execution.outputs import NodeOutput
from rlhf_dist.wire import HeldState, numbers_in


class HeldStates:
    """Of every state of a run, and how far its sources have been drawn."""

    def __init__(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """values: what each begins with."""
        self.numbers: dict[str, dict[str, float]] = {name: numbers_in(of) for name, of in values.items()}
        self._first = {
            name: {key: value for key, value in of.items() if key not in self.numbers[name]}
            for name, of in values.items()
        }
        self._held: dict[str, Any] = {}

    def of(self, name: str) -> HeldState:
        """What is held of a state now."""
        return HeldState(self.numbers[name], self._held.get(name), self._first.get(name, {}))

    def restore(self, name: str, held: HeldState) -> None:
        """Go on from what `of` gave, or a checkpoint."""
        self.numbers[name], self._held[name] = dict(held.numbers), held.ref
        self._first[name] = dict(held.first)

    def take(self, name: str, output: NodeOutput) -> None:
        """What an op has made of a state, if it has one."""
        if output.state is None:
            return
        self.numbers[name] = dict(output.state)
        self._held[name] = output.held
        self._first.pop(name, None)  # an op may have let go of what the state began with
