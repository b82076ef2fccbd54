"""Steps that teach nothing, seen in their metrics: said to people at the 1st, 10th, 100th, ... in a row.

zero_variance_groups = 1    every group's rewards are equal: no response is better than another
grad_norm = 0               a role's update had no gradient
optimizer_steps = 0         a role made no optimizer step, since no rows were left for it
"""

from __future__ import annotations

from collections.abc import Mapping


class StepWarnings:
    """Watches the steps of one run, in order."""

    def __init__(self) -> None:
        self.steps = 0
        """Steps that taught nothing so far."""
        self._in_a_row = 0
        self._seen = -1

    def of(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """What to say after step `step` (from 0), given its metrics by `NODE/NAME`; None for nothing, and for a step
        that is run again."""
        if step <= self._seen:
            return None
        self._seen = step
        said = nothing_learned(metrics)
        if said is None:
            self._in_a_row = 0
            return None
        self.steps += 1
        self._in_a_row += 1
        if self._in_a_row not in (10**power for power in range(12)):
            return None
        again = f" ({self._in_a_row} steps in a row)" if self._in_a_row > 1 else ""
        return f"warning: step {step + 1}{again}: {said}"


def nothing_learned(metrics: Mapping[str, float]) -> str | None:
    """Why a step with these metrics taught nothing, and what may help; None if it taught something."""
    equal = [node for node, value in _named(metrics, "zero_variance_groups") if value >= 1]
    skipped = {node for node, value in _named(metrics, "skipped_steps") if value}
    idle = [node for node, value in _named(metrics, "optimizer_steps") if value == 0 and node not in skipped]
    still = [node for node, value in _named(metrics, "grad_norm") if value == 0]
    parts = []
    if equal:
        parts.append(f"the rewards of every group are equal ({', '.join(equal)}/zero_variance_groups is 1)")
    if still:
        parts.append(f"the gradient of {', '.join(still)} is exactly 0")
    if idle:
        parts.append(f"{', '.join(idle)} made no optimizer step, since no rows were left")
    if idle:
        lost = [f"{node} lost {value:g} episodes (rlhf-dist rollouts RUN --lost)" for node, value in _lost(metrics)]
        parts += lost
    if not parts:
        return None
    effect = "nothing is learnt in this step" if still or idle else "the rewards teach nothing in this step"
    where = "the rewards, and try other prompts, more samples a prompt or a higher temperature" if equal else "the rows"
    return f"{', and '.join(parts)}: {effect}; look at {where}"


def _lost(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """(node, episodes) where some were lost."""
    return [(node, value) for node, value in _named(metrics, "lost") if value]


def _named(metrics: Mapping[str, float], name: str) -> list[tuple[str, float]]:
    """(node, value) of every metric NODE/name."""
    return [(key.removesuffix(f"/{name}"), value) for key, value in metrics.items() if key.endswith(f"/{name}")]
