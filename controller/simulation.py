"""Schedules on a clock: the executor of a real run with nodes that only take time. No processes, no GPU.

    spans = simulate(trace(ppo), pool_of={"actor": "a", "critic": "b"}, seconds=lambda node, step: 1.0, steps=3)
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from controller.executor import Finished, StepReport, run_steps
from rlhf_dist.dataflow.graph import Dataflow, Node

Seconds = Callable[[Node, int], float]
"""(node, step) -> how long it takes."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A node on a pool, from start to end; on none, pool is None."""

    node: str
    step: int
    pool: str | None
    start_s: float
    end_s: float


def simulate(
    dataflow: Dataflow,
    *,
    pool_of: Mapping[str, str],
    seconds: Seconds,
    steps: int,
    start: int = 0,
    open_steps: int = 2,
    barrier: Callable[[int], bool] = lambda step: False,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> list[Span]:
    """Spans of steps start..start + steps - 1, in the order of their ends.

    pool_of: node name or role -> its pool; what is in neither way named occupies none. The other arguments
    are `run_steps`'s.
    """
    clock = Clock(pool_of, seconds)
    run_steps(dataflow, clock, start=start, stop=start + steps, on_step=on_step, open_steps=open_steps, barrier=barrier)
    return [
        Span(
            node=one.node,
            step=one.step,
            pool=clock.pool_of(dataflow[one.node]),
            start_s=one.started_s,
            end_s=one.ended_s,
        )
        for one in clock.history
    ]


class Clock:
    """A runner whose nodes take the time they are given."""

    def __init__(self, pool_of: Mapping[str, str], seconds: Seconds) -> None:
        self._pool_of, self._seconds = pool_of, seconds
        self.now_s = 0.0
        self.history: list[Finished] = []
        self._running: list[tuple[float, int, Finished]] = []
        self._launched = 0

    def pool_of(self, node: Node) -> str | None:
        """See Runner."""
        return self._pool_of.get(node.name, self._pool_of.get(node.role))

    def launch(self, node: Node, step: int) -> None:
        """See Runner."""
        ends = self.now_s + self._seconds(node, step)
        self._launched += 1
        one = Finished(node=node.name, step=step, started_s=self.now_s, ended_s=ends, metrics={})
        heapq.heappush(self._running, (ends, self._launched, one))

    def wait(self) -> list[Finished]:
        """See Runner: the clock moves to the next end."""
        self.now_s, _, one = heapq.heappop(self._running)
        self.history.append(one)
        return [one]

    def end_step(self, step: int) -> None:
        """See Runner; there is nothing to drop."""
