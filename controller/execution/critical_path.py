"""How short a schedule can be, and what made a measured one as long as it was.

Nodes of several steps, unrolled: an edge of distance d runs from step t to step t + d. Two lower bounds on
the time of all steps, whatever the order in which they run:

    path     the longest chain of nodes that wait for one another
    pool     of any nodes of one pool: least chain before one of them + their work + least chain after one of them

The largest of the latter over all sets of nodes is what a schedule needs that may interrupt them, found by always
running the ready one with the longest chain after it (Carlier 1982, "The one-machine sequencing problem", on
Jackson's preemptive schedule).
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from controller.execution.executor import Finished
from controller.execution.simulation import Seconds
from rlhf_dist.dataflow.graph import Dataflow, Node

Instance = tuple[str, int]
"""A node of a step."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """A node on the critical path, and how long nothing on the path ran before it."""

    node: str
    step: int
    seconds: float
    waited_s: float


def lower_bound_s(
    dataflow: Dataflow, *, pools_of: Callable[[Node], tuple[str, ...]], seconds: Seconds, steps: int
) -> float:
    """Seconds that `steps` steps from 0 take at least. Nodes take `seconds`; a pool runs one node at a time."""
    order: list[Instance] = [(node.name, step) for step in range(steps) for node in dataflow if node.runs_at(step)]
    lasts = {(node.name, step): seconds(node, step) for step in range(steps) for node in dataflow}
    before = _predecessors(dataflow, order)
    head: dict[Instance, float] = {}
    for at in order:
        head[at] = max((head[other] + lasts[other] for other in before[at]), default=0.0)
    tail = dict.fromkeys(order, 0.0)
    for at in reversed(order):
        for other in before[at]:
            tail[other] = max(tail[other], tail[at] + lasts[at])
    members: dict[str, list[Instance]] = {}
    for at in order:
        for pool in pools_of(dataflow[at[0]]):
            members.setdefault(pool, []).append(at)
    loads = [_one_machine_s([(head[at], lasts[at], tail[at]) for at in inside]) for inside in members.values()]
    return max([*(head[at] + lasts[at] for at in order), *loads], default=0.0)


def _one_machine_s(jobs: list[tuple[float, float, float]]) -> float:
    """The least seconds for jobs (earliest start, work, least time afterwards) that take turns; see the module."""
    waiting = sorted(jobs, reverse=True)
    ready: list[tuple[float, float]] = []  # (-time afterwards, work left)
    now = longest = 0.0
    while waiting or ready:
        if not ready:
            now = max(now, waiting[-1][0])
        while waiting and waiting[-1][0] <= now:
            _, work, after = waiting.pop()
            heapq.heappush(ready, (-after, work))
        after, work = heapq.heappop(ready)
        runs = min(work, waiting[-1][0] - now) if waiting else work
        now += runs
        if runs < work:
            heapq.heappush(ready, (after, work - runs))
        else:
            longest = max(longest, now - after)
    return longest


def critical_path(
    dataflow: Dataflow, finished: Iterable[Finished], pools_of: Callable[[Node], tuple[str, ...]]
) -> list[Link]:
    """The chain that ends with the last node: each link is what the next one waited for the longest.

    A node waits for those whose columns or weights it uses and for the node before it on its pools; one that waited
    for none of these, for all that had ended: the controller lets nothing start over an evaluation or a checkpoint.
    One that ran several times (interrupted, or as pieces arrived) is there with each run; one that took a piece of what
    was still being made waited for it until then. Returns the links in the order of time.
    """
    runs = sorted(finished, key=lambda one: (one.started_s, one.ended_s))
    if not runs:
        return []
    runs_of: dict[Instance, list[int]] = {}
    on_pool: dict[str, list[int]] = {}
    pool_before: list[list[int]] = []
    for at, one in enumerate(runs):
        runs_of.setdefault((one.node, one.step), []).append(at)
        lines = [on_pool.setdefault(pool, []) for pool in pools_of(dataflow[one.node])]
        pool_before.append([line[-1] for line in lines if line])
        for line in lines:
            line.append(at)
    before = _predecessors(dataflow, list(runs_of))
    by_end = sorted(range(len(runs)), key=lambda at: runs[at].ended_s)
    links: list[Link] = []
    now: int | None = by_end[-1]
    until_s = runs[by_end[-1]].ended_s
    while now is not None:
        run = runs[now]
        own = run.node, run.step
        known = [at for at in pool_before[now] if runs[at].ended_s <= run.started_s + 1e-3]
        known += [at for other in (own, *before[own]) for at in runs_of[other]]
        # Only what began before it: what took no time is no circle. What goes on comes after what ended just then.
        until = {at: min(runs[at].ended_s, run.started_s) for at in known if at < now}
        last = max(until, key=lambda at: (until[at], runs[at].ended_s <= run.started_s), default=None)
        if last is None:
            ended = bisect.bisect_right(by_end, run.started_s, key=lambda at: runs[at].ended_s)
            last = next((at for at in reversed(by_end[:ended]) if at < now), None)
        last_s = run.started_s if last is None else min(runs[last].ended_s, run.started_s)
        links.append(
            Link(node=run.node, step=run.step, seconds=until_s - run.started_s, waited_s=run.started_s - last_s)
        )
        now, until_s = last, last_s
    return links[::-1]


def seconds_on_path(links: Iterable[Link]) -> dict[str, float]:
    """Node -> its seconds on the path, longest first; `waiting` for the gaps."""
    total: dict[str, float] = {}
    for link in links:
        total[link.node] = total.get(link.node, 0.0) + link.seconds
        total["waiting"] = total.get("waiting", 0.0) + link.waited_s
    return dict(sorted(total.items(), key=lambda entry: -entry[1]))


def _predecessors(dataflow: Dataflow, instances: list[Instance]) -> dict[Instance, list[Instance]]:
    """Instance -> those among `instances` that it waits for."""
    there = set(instances)
    edges: Mapping[str, set[Instance]] = {node.name: set() for node in dataflow}
    for source, target, distance in dataflow.waits:
        edges[target].add((source, distance))
    return {
        (name, step): [(source, step - d) for source, d in sorted(edges[name]) if (source, step - d) in there]
        for name, step in instances
    }
