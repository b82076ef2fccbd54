"""Schedules on a clock: the executor of a real run with nodes that only take time. No processes, no GPU.

    spans = simulate(trace(ppo), pool_of={"actor": "a", "critic": "b"}, seconds=lambda node, step: 1.0, steps=3)

The planner asks it what a placement costs, tests ask it whether a schedule keeps its promises, and the
benchmark takes a placement's bound from it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from controller.executor import Finished, StepReport, run_steps
from rlhf_dist.dataflow.graph import Dataflow, Node

Seconds = Callable[[Node, int], float]
"""(node, step) -> how long it takes."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A node on a pool, from start to end; a node on two pools has two spans, one on none has pool None."""

    node: str
    step: int
    pool: str | None
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


def simulate(
    dataflow: Dataflow,
    *,
    pool_of: Mapping[str, str | tuple[str, ...]],
    seconds: Seconds,
    steps: int,
    start: int = 0,
    open_steps: int = 2,
    barrier: Callable[[int], bool] = lambda step: False,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> list[Span]:
    """Spans of steps start..start + steps - 1, in the order of their ends.

    pool_of: node name or role -> its pool, or its pools for a node that needs several; what is in neither
    way named occupies none. The other arguments are `run_steps`'s. Raises RuntimeError for a graph that
    cannot be scheduled.
    """
    clock = Clock(pool_of, seconds)
    run_steps(dataflow, clock, start=start, stop=start + steps, on_step=on_step, open_steps=open_steps, barrier=barrier)
    pools = {node.name: clock.pools_of(node) or (None,) for node in dataflow}
    return [
        Span(node=one.node, step=one.step, pool=pool, start_s=one.started_s, end_s=one.ended_s)
        for one in clock.history
        for pool in pools[one.node]
    ]


class Clock:
    """A runner whose nodes take the time they are given."""

    def __init__(self, pool_of: Mapping[str, str | tuple[str, ...]], seconds: Seconds) -> None:
        self._pool_of, self._seconds = pool_of, seconds
        self.now_s = 0.0
        self.history: list[Finished] = []
        self._running: list[tuple[float, int, Finished]] = []
        self._launched = 0

    def pools_of(self, node: Node) -> tuple[str, ...]:
        """See Runner."""
        pools = self._pool_of.get(node.name, self._pool_of.get(node.role, ()))
        return (pools,) if isinstance(pools, str) else pools

    def launch(self, node: Node, step: int) -> None:
        """See Runner."""
        ends = self.now_s + self._seconds(node, step)
        one = Finished(node=node.name, step=step, started_s=self.now_s, ended_s=ends, metrics={})
        self._launched += 1
        heapq.heappush(self._running, (ends, self._launched, one))

    def wait(self) -> list[Finished]:
        """See Runner: the clock moves to the next end."""
        self.now_s, _, one = heapq.heappop(self._running)
        self.history.append(one)
        return [one]

    def end_step(self, step: int) -> None:
        """See Runner; there is nothing to drop."""


def busy_s(spans: Iterable[Span]) -> dict[str, float]:
    """Pool -> seconds in which it works."""
    total: dict[str, float] = {}
    for span in spans:
        if span.pool is not None:
            total[span.pool] = total.get(span.pool, 0.0) + span.seconds
    return total
