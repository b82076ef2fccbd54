"""What the executor would schedule, on a clock: the same rules as `controller/execution/executor.py`, without a runner.

    ready instances, oldest step first, then recipe order  ->  start if all their pools are idle
    the earliest end  ->  its pools are free, its successors (same step, or step + distance) count down

`tests/planner/test_step_time.py` proves that both give the same times. This one works on integers, because a
search calls it thousands of times. `bound` is a lower bound on the steady step that needs no simulation.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, lcm

from rlhf_dist.planner.work import Problem

WARM_UP = 4
"""Steps until a schedule repeats itself."""
MEASURED = 8
"""Steps over which the steady step is averaged, at least; three times as many with staleness above 1."""
LONGEST_PERIOD = 64
"""Most steps after which cadences may come together again in a simulation."""


@dataclass(frozen=True)
class Graph:
    """A dataflow with its nodes numbered in recipe order."""

    names: tuple[str, ...]
    edges: tuple[tuple[int, int, int], ...]
    """(source, target, distance)."""
    every: tuple[int, ...]
    after: tuple[int, ...]
    open_steps: int

    @classmethod
    def of(cls, problem: Problem, *, overlap: bool = True) -> Graph:
        """The graph of a problem. Without overlap, a step starts when the one before has ended."""
        nodes = problem.dataflow.nodes
        names = tuple(node.name for node in nodes)
        index = {name: position for position, name in enumerate(names)}
        edges = tuple((index[source], index[target], distance) for source, target, distance in problem.edges())
        every, after = tuple(node.every for node in nodes), tuple(node.after for node in nodes)
        return cls(names, edges, every, after, problem.staleness + 2 if overlap else 1)

    @cached_property
    def warm(self) -> Graph:
        """The graph as it is once every node has begun to run."""
        return replace(self, after=(0,) * len(self.names))

    @cached_property
    def repeating(self) -> tuple[Graph, tuple[int, ...]]:
        """The graph with a schedule that repeats itself soon, and what each node's seconds are divided by: what runs
        rarest is spread over the steps between, so that no simulation waits for a refresh every 100,000 steps."""
        every, divisors = list(self.every), [1] * len(self.every)
        while lcm(*every) > LONGEST_PERIOD:
            rarest = max(range(len(every)), key=every.__getitem__)
            divisors[rarest], every[rarest] = every[rarest], 1
        return (self if every == list(self.every) else replace(self, every=tuple(every))), tuple(divisors)

    @cached_property
    def after_of(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Node -> (successor, distance)."""
        return tuple(tuple((t, d) for s, t, d in self.edges if s == node) for node in range(len(self.names)))

    @cached_property
    def before_of(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Node -> (predecessor, distance)."""
        return tuple(tuple((s, d) for s, t, d in self.edges if t == node) for node in range(len(self.names)))

    @cached_property
    def loops(self) -> tuple[tuple[int, int, int, tuple[int, ...]], ...]:
        """(first, last, distance, nodes on a path from first to last) of every edge that leads to a later step.

        With one step at a time, all of a step is one loop.
        """
        if self.open_steps == 1:
            return ((0, len(self.names) - 1, 1, tuple(range(len(self.names)))),)
        found = []
        reach = [self._reachable(node) for node in range(len(self.names))]
        for last, first, distance in self.edges:
            if distance and last in reach[first]:
                found.append((first, last, distance, tuple(n for n in sorted(reach[first]) if last in reach[n])))
        # A loop inside another one of the same distance adds nothing.
        outer = [
            loop
            for loop in found
            if not any(o is not loop and o[2] <= loop[2] and set(loop[3]) < set(o[3]) for o in found)
        ]
        return tuple(dict.fromkeys(outer))

    def chained(self, first: Sequence[int], last: int, takes_time: Sequence[bool]) -> bool:
        """Whether in every loop through `last` all that takes time is one of `first` or comes after all of them."""
        reach = [self._reachable(node) for node in first]
        for _, _, _, members in self.loops:
            if last in members:
                late = [node for node in members if takes_time[node] and node not in first]
                if not set(first) <= set(members) or not all(node in after for node in late for after in reach):
                    return False
        return True

    def _reachable(self, start: int) -> set[int]:
        seen, stack = {start}, [start]
        while stack:
            for target, distance in self.after_of[stack.pop()]:
                if distance == 0 and target not in seen:
                    seen.add(target)
                    stack.append(target)
        return seen


@dataclass(frozen=True)
class Slot:
    """A node at a step on the clock."""

    node: int
    step: int
    start_s: float
    end_s: float


def simulate_steps(
    graph: Graph, pools: Sequence[tuple[int, ...]], seconds: Sequence[float], steps: int
) -> tuple[list[Slot], list[float]]:
    """Slots in the order of their ends, and when each step was finished.

    pools: node -> the pools it occupies (none: any number run at a time).
    """
    count = len(graph.names)
    before, after = graph.before_of, graph.after_of
    runs = [[step >= graph.after[n] and step % graph.every[n] == 0 for step in range(steps)] for n in range(count)]
    done = [[False] * count for _ in range(steps)]
    left_in_step = [count] * steps
    waiting: list[list[int]] = []
    ready: list[tuple[int, int]] = []
    running: list[tuple[float, int, int, int]] = []
    slots: list[Slot] = []
    started: dict[tuple[int, int], float] = {}
    closed_at: list[float] = []
    busy: set[int] = set()
    now, launched, opened, closed = 0.0, 0, 0, 0

    def finish(node: int, step: int) -> None:
        done[step][node] = True
        left_in_step[step] -= 1
        for target, distance in after[node]:
            at = step + distance
            if at < opened:
                waiting[at][target] -= 1
                if waiting[at][target] == 0:
                    ready.append((at, target))

    while closed < steps:
        while opened < min(steps, closed + graph.open_steps):
            step = opened
            opened += 1
            waiting.append(
                [sum(1 for s, d in before[n] if step - d >= 0 and not done[step - d][s]) for n in range(count)]
            )
            ready.extend((step, n) for n in range(count) if waiting[step][n] == 0)
        progressed = True
        while progressed:
            progressed = False
            claimed = set(busy)
            ready.sort()
            for entry in ready:
                step, node = entry
                if not runs[node][step]:
                    ready.remove(entry)
                    finish(node, step)
                    progressed = True
                    break
                if claimed.isdisjoint(pools[node]):
                    ready.remove(entry)
                    busy.update(pools[node])
                    launched += 1
                    started[node, step] = now
                    heapq.heappush(running, (now + seconds[node], launched, node, step))
                    progressed = True
                    break
                claimed.update(pools[node])
        if running:
            now, _, node, step = heapq.heappop(running)
            busy.difference_update(pools[node])
            slots.append(Slot(node, step, started.pop((node, step)), now))
            finish(node, step)
        else:
            assert closed < opened and left_in_step[closed] == 0, "the graph has no cycle within a step"
        while closed < opened and left_in_step[closed] == 0:
            closed_at.append(now)
            closed += 1
    return slots, closed_at


def step_seconds(graph: Graph, pools: Sequence[tuple[int, ...]], seconds: Sequence[float]) -> float:
    """Seconds of a step once the schedule repeats itself; never below `bound`, which holds for any schedule."""
    graph, divisors = graph.repeating
    seconds = [one / divisor for one, divisor in zip(seconds, divisors, strict=True)]
    if graph.open_steps == 1 and max(graph.every) == 1:  # Every step is like the first that runs all nodes.
        return simulate_steps(graph.warm, pools, seconds, 1)[1][-1]
    # Whole periods (a schedule may repeat only after as many steps as are open at once); the last steps that are
    # simulated have nothing after them that competes, so they do not count.
    period = lcm(lcm(*graph.every) * lcm(*(distance for _, _, distance in graph.edges if distance)), graph.open_steps)
    warm, measured = WARM_UP * graph.open_steps, period * ceil(MEASURED * (3 if graph.open_steps > 3 else 1) / period)
    _, closed = simulate_steps(graph.warm, pools, seconds, warm + measured + graph.open_steps + 1)
    return max((closed[warm + measured - 1] - closed[warm - 1]) / measured, bound(graph, pools, seconds))


def bound(graph: Graph, pools: Sequence[tuple[int, ...]], seconds: Sequence[float]) -> float:
    """A lower bound on the steady step of any schedule: pool loads, loops through weights, pools inside loops.

    A pool works off what is placed on it: sum of its nodes' seconds (a node that runs every k-th step counts
    1/k). A loop of edges with distance d passes once in d steps, so its longest path / d. On that path a pool's
    nodes run one after another, after the shortest way to any of them and before the shortest way on.
    """
    share = [s / every for s, every in zip(seconds, graph.every, strict=True)]
    loads: dict[int, float] = {}
    for node, where in enumerate(pools):
        for pool in where:
            loads[pool] = loads.get(pool, 0.0) + share[node]
    best = max(loads.values(), default=0.0)
    for _, _, distance, members in graph.loops:
        # What does not run at every step is left out: then the path is there at every step.
        weight = {n: seconds[n] if graph.every[n] == 1 else 0.0 for n in members}
        head = dict.fromkeys(members, 0.0)
        for n in members:
            for target, d in graph.after_of[n]:
                if d == 0 and target in head:
                    head[target] = max(head[target], head[n] + weight[n])
        tail = dict.fromkeys(members, 0.0)
        for n in reversed(members):
            for target, d in graph.after_of[n]:
                if d == 0 and target in tail:
                    tail[n] = max(tail[n], tail[target] + weight[target])
        longest = max(head[n] + weight[n] for n in members)
        on_pool: dict[int, list[int]] = {}
        for n in members:
            if weight[n] > 0:
                for pool in pools[n]:
                    on_pool.setdefault(pool, []).append(n)
        for nodes in on_pool.values():
            if len(nodes) == 1:
                continue  # On the longest path, if anywhere.
            # Any of them that start no earlier and leave no less to do than these.
            for start in {head[n] for n in nodes}:
                for rest in {tail[n] for n in nodes}:
                    work = sum(weight[n] for n in nodes if head[n] >= start and tail[n] >= rest)
                    if work:
                        longest = max(longest, start + work + rest)
        best = max(best, longest / distance)
    return best
