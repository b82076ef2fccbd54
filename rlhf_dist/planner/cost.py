"""What a node costs under a strategy: seconds by cause, bytes by tensor class, and ways to run it in less memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rlhf_dist.planner.strategy import Strategy


class NodeCost(NamedTuple):
    """What a node costs under a strategy. A search makes tens of thousands, so names and texts are put in later."""

    seconds: float
    part_names: tuple[str, ...] = ()
    part_seconds: tuple[float, ...] = ()
    memory_names: tuple[str, ...] = ()
    memory_bytes: tuple[float, ...] = ()
    passes: int = 0
    """Micro-batches of a training or inference node."""
    rows: float = 0.0
    """Rows of one of them; for generation those of a replica."""
    recompute: bool = False
    """Whether activations are computed again in the backward pass."""
    text: str = ""
    """How it runs, where passes do not say it."""
    holding: Strategy | None = None
    """The holding it runs under, where that is not the one its role is held in."""

    @property
    def parts(self) -> dict[str, float]:
        """Where the seconds go: compute, communication, offload, ..."""
        return dict(zip(self.part_names, self.part_seconds, strict=True))

    @property
    def memory(self) -> dict[str, float]:
        """Tensor class -> bytes per GPU needed while it runs, beside what roles hold at rest."""
        return dict(zip(self.memory_names, self.memory_bytes, strict=True))

    @property
    def needed(self) -> float:
        """Bytes per GPU needed while it runs, beside what roles hold at rest."""
        return sum(self.memory_bytes)

    @property
    def note(self) -> str:
        """How it runs, for people."""
        if not self.passes:
            return self.text
        what = f"{self.passes} pass{'es' if self.passes > 1 else ''} of {self.rows:.3g} rows"
        what += ", recompute" if self.recompute else ""
        return f"{what}, as {self.holding.text}" if self.holding is not None else what


def cost_of(
    parts: Mapping[str, float],
    memory: Mapping[str, float],
    scale: float,
    *,
    text: str = "",
) -> NodeCost:
    """A cost from named parts; `scale`: how much longer it takes by measured runs (`Efficiency.*_scale`)."""
    seconds = tuple(value * scale for value in parts.values())
    return NodeCost(sum(seconds), tuple(parts), seconds, tuple(memory), tuple(memory.values()), text=text)


Variants = tuple[tuple[float, NodeCost], ...]
"""(bytes per GPU it needs beside what is at rest, cost), more memory and less time with every entry."""


def cheapest(variants: Variants, budget: float) -> NodeCost | None:
    """The fastest way to run a node in `budget` bytes per GPU; None if there is none."""
    found: NodeCost | None = None
    for need, cost in variants:
        if need > budget:
            break
        found = cost
    return found


def staircase(ways: list[tuple[float, NodeCost]]) -> Variants:
    """Ways to run a node without those that need more memory and no less time."""
    kept: list[tuple[float, NodeCost]] = []
    for need, cost in sorted(ways, key=lambda way: (way[0], way[1].seconds)):
        if not kept or cost.seconds < kept[-1][1].seconds:
            kept.append((need, cost))
    return tuple(kept)
