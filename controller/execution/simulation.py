"""Schedules on a clock: the executor of a real run with nodes that only take time. No processes, no GPU.

    spans = simulate(trace(ppo), pool_of={"actor": "a", "critic": "b"}, seconds=lambda node, step: 1.0, steps=3)

The planner asks it what a placement costs, tests ask it whether a schedule keeps its promises, and the
benchmark takes a placement's bound from it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from controller.execution.executor import Finished, StepReport, run_steps
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
    open_steps: int | None = None,
    interrupt: bool = False,
    barrier: Callable[[int], bool] = lambda step: False,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> list[Span]:
    """Spans of steps start..start + steps - 1, in the order of their ends.

    pool_of: node name or role -> its pool, or its pools for a node that needs several; what is in neither
    way named occupies none. interrupt: generation gives its pool up to a weight sync that waits for it. The
    other arguments are `run_steps`'s. Raises RuntimeError for a graph that cannot be scheduled.
    """
    clock = Clock(pool_of, seconds, interrupt=interrupt)
    run_steps(dataflow, clock, start=start, stop=start + steps, on_step=on_step, open_steps=open_steps, barrier=barrier)
    pools = {node.name: clock.pools_of(node) or (None,) for node in dataflow}
    return [
        Span(node=one.node, step=one.step, pool=pool, start_s=one.started_s, end_s=one.ended_s)
        for one in clock.history
        for pool in pools[one.node]
    ]


class Clock:
    """A runner whose nodes take the time they are given."""

    def __init__(
        self, pool_of: Mapping[str, str | tuple[str, ...]], seconds: Seconds, *, interrupt: bool = False
    ) -> None:
        self._pool_of, self._seconds, self._interrupts = pool_of, seconds, interrupt
        self.now_s = 0.0
        self.history: list[Finished] = []
        self._running: list[tuple[float, int, Finished]] = []
        self._left_s: dict[tuple[str, int], float] = {}
        self._launched = 0

    def pools_of(self, node: Node) -> tuple[str, ...]:
        """See Runner."""
        pools = self._pool_of.get(node.name, self._pool_of.get(node.role, ()))
        return (pools,) if isinstance(pools, str) else pools

    def streams(self, source: Node, target: Node) -> bool:
        """See Runner: a node on the clock has one end, and no shards before it."""
        return False

    def follows(self, source: Node, target: Node) -> bool:
        """See Runner."""
        return False

    def follow(self, node: Node, step: int) -> None:
        """See Runner: nothing streams, so nothing follows."""

    def launch(self, node: Node, step: int) -> None:
        """See Runner."""
        ends = self.now_s + self._left_s.pop((node.name, step), self._seconds(node, step))
        self._push(Finished(node=node.name, step=step, started_s=self.now_s, ended_s=ends, metrics={}))

    def interrupt(self, node: Node, step: int) -> None:
        """See Runner: what generates ends now, and takes the rest of its time when it is launched again."""
        if not self._interrupts or not any(state.endswith(".rollout") for state in node.weights_read):
            return
        for entry in self._running:
            ends_s, _, one = entry
            if (one.node, one.step) == (node.name, step) and ends_s > self.now_s:
                self._running.remove(entry)
                heapq.heapify(self._running)
                self._left_s[node.name, step] = ends_s - self.now_s
                self._push(replace(one, ended_s=self.now_s, interrupted=True))
                return

    @property
    def next_end_s(self) -> float:
        """When `wait` returns."""
        return self._running[0][0]

    def wait(self) -> list[Finished]:
        """See Runner: the clock moves to the next end."""
        self.now_s, _, one = heapq.heappop(self._running)
        self.history.append(one)
        return [one]

    def _push(self, one: Finished) -> None:
        self._launched += 1
        heapq.heappush(self._running, (one.ended_s, self._launched, one))

    def end_step(self, step: int) -> None:
        """See Runner; there is nothing to drop."""
