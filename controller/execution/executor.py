"""The executor: starts every node as soon as its columns, weights and pool are free.

    +--------------------------------------------------------------------------+
    |  ready instances (node, step), oldest step first, then recipe order      |
    |      |  all its pools idle?  step open?                                  |
    |      v                                                                   |
    |  runner.launch(node, step)            on its pools, nothing waits here   |
    |      |                                                                   |
    |  runner.wait()  <-- blocks until any launched node is finished           |
    |      |              (bounded: a node past its time limit is an error)    |
    |      v                                                                   |
    |  count down the edges of its successors (same step, or step + distance)  |
    +--------------------------------------------------------------------------+

    streamed edge    the successor starts with its source and takes each shard as it is finished; on pools of its own
                     it has them for one piece at a time, whenever the runner says that one is there
    interrupted      a node that gave its pool up to an older one; ready again, to go on where it was

Pure scheduling: what a node does, on what, is the runner's business (`ray_runner.py` runs it on worker
groups, `simulation.py` on a clock). One node at a time runs on a pool, so roles that share processes
take turns and roles on different pools overlap. A node on two pools (a weight transfer) starts when both
are idle; it never holds one while it waits for the other, so transfers cannot deadlock, and a pool it
waits for takes nothing that comes after it, so it cannot starve. Steps overlap as far as edges allow:
the next prompts are drawn while this step trains. A barrier step waits until everything before is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rlhf_dist.dataflow.graph import Dataflow, Node


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A node that is done."""

    node: str
    step: int
    started_s: float
    ended_s: float
    metrics: dict[str, float]
    tokens: int = 0
    """Tokens of the rows it worked on."""
    nbytes: int = 0
    """Bytes it wrote to the object store, or moved between worlds."""
    interrupted: bool = False
    """It gave its pools up before it was done, and is to be launched again."""
    waits: bool = False
    """It gave its pools up until `Arrived` says that there is more for it."""


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """There is a piece for a node that takes the rows of another, as they are made."""

    node: str
    step: int


class Runner(Protocol):
    """Runs nodes. Times are seconds on the runner's own clock."""

    def pools_of(self, node: Node) -> tuple[str, ...]:
        """The pools a node occupies; none for nodes of which any number run at a time."""
        ...

    def streams(self, source: Node, target: Node) -> bool:
        """Whether `target` may be launched as soon as `source` is, to take its shards one by one. It then
        finishes after `source`."""
        ...

    def follows(self, source: Node, target: Node) -> bool:
        """Whether one that streams is launched anew for each piece that has arrived, and has its pools only so long."""
        ...

    def follow(self, node: Node, step: int) -> None:
        """From now on say, in `wait`, when there is a piece for this node; what streams to it may be finished."""
        ...

    def launch(self, node: Node, step: int) -> None:
        """Start a node; its inputs are finished, or streamed."""
        ...

    def interrupt(self, node: Node, step: int) -> None:
        """An older node waits for the pools of this running one, and for nothing else. The runner may make it
        finish early as `interrupted`, or let it run."""
        ...

    def wait(self) -> Sequence[Finished | Arrived]:
        """Block until at least one launched node is finished, or something has arrived. Raises what a node raised."""
        ...

    def end_step(self, step: int) -> None:
        """All nodes of `step` are finished: what it left may be dropped."""
        ...


@dataclass
class StepReport:
    """What a step did. A node that was interrupted is there once for each time it ran."""

    step: int
    nodes: list[Finished] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """All nodes' metrics."""
        return {name: value for node in self.nodes for name, value in node.metrics.items()}

    @property
    def seconds(self) -> dict[str, float]:
        """Node -> seconds."""
        total = dict.fromkeys((node.node for node in self.nodes), 0.0)
        for node in self.nodes:
            total[node.node] += node.ended_s - node.started_s
        return total

    @property
    def started_s(self) -> float:
        """When its first node started."""
        return min(node.started_s for node in self.nodes)

    @property
    def ended_s(self) -> float:
        """When its last node ended."""
        return max(node.ended_s for node in self.nodes)


def run_steps(
    dataflow: Dataflow,
    runner: Runner,
    *,
    start: int,
    stop: int,
    on_step: Callable[[StepReport], None],
    open_steps: int | None = None,
    barrier: Callable[[int], bool] = lambda step: False,
) -> None:
    """Run steps start..stop-1 of `dataflow`.

    on_step is called once per step, in order, when the step is finished. At most `open_steps` steps are
    under way (None: as many as may have work, the graph's staleness and one for the next prompts). If
    `barrier(t)`, nothing of step t + 1 starts before on_step(t) has returned.
    """
    most = dataflow.staleness + 2 if open_steps is None else open_steps
    _Schedule(dataflow, runner, start, stop, on_step, most, barrier).run()


class _Schedule:
    def __init__(
        self,
        dataflow: Dataflow,
        runner: Runner,
        start: int,
        stop: int,
        on_step: Callable[[StepReport], None],
        open_steps: int,
        barrier: Callable[[int], bool],
    ) -> None:
        self.nodes = {node.name: node for node in dataflow}
        self.position = {node.name: position for position, node in enumerate(dataflow)}
        self.runner, self.start, self.stop = runner, start, stop
        self.on_step, self.open_steps, self.barrier = on_step, open_steps, barrier
        edges = dataflow.waits
        self.before: dict[str, list[tuple[str, int]]] = {name: [] for name in self.nodes}
        self.after: dict[str, list[tuple[str, int]]] = {name: [] for name in self.nodes}
        for source, target, distance in sorted(edges):
            self.before[target].append((source, distance))
            self.after[source].append((target, distance))
        self.streamed = {
            (source, target)
            for source, target, distance in edges
            if distance == 0 and runner.streams(self.nodes[source], self.nodes[target])
        }
        self.following = {
            target for source, target in self.streamed if runner.follows(self.nodes[source], self.nodes[target])
        }
        self.done: set[tuple[str, int]] = set()
        self.launched: set[tuple[str, int]] = set()
        self.busy: dict[str, tuple[str, int]] = {}
        self.waiting: dict[tuple[str, int], int] = {}
        self.ready: list[tuple[int, int, str]] = []
        self.reports: dict[int, StepReport] = {}
        self.opened = start
        self.closed = start
        self.in_flight = 0

    def run(self) -> None:
        while self.closed < self.stop:
            self._open()
            self._launch()
            if self.in_flight:
                for event in self.runner.wait():
                    if isinstance(event, Arrived):
                        self.in_flight -= 1
                        self._make_ready(event.node, event.step)
                    else:
                        self._take(event)
            elif not self._close_finished():
                stuck = ", ".join(f"{name} of step {step}" for (name, step), left in self.waiting.items() if left)
                raise RuntimeError(f"the schedule cannot go on: nothing runs and these wait: {stuck}")
            self._close_finished()

    def _open(self) -> None:
        while self.opened < min(self.stop, self.closed + self.open_steps):
            if any(self.barrier(step) for step in range(self.closed, self.opened)):
                return
            step = self.opened
            self.opened += 1
            self.reports[step] = StepReport(step)
            for name in self.nodes:
                left = sum(
                    1
                    for source, distance in self.before[name]
                    if step - distance >= self.start
                    and (source, step - distance) not in self.done
                    and not ((source, name) in self.streamed and (source, step) in self.launched)
                )
                self.waiting[name, step] = left
            for name in self.nodes:
                if self.waiting[name, step] == 0:
                    self._make_ready(name, step)

    def _make_ready(self, name: str, step: int) -> None:
        self.ready.append((step, self.position[name], name))

    def _launch(self) -> None:
        progressed = True
        while progressed:
            progressed = False
            claimed = set(self.busy)
            for entry in sorted(self.ready):
                step, _, name = entry
                node = self.nodes[name]
                if not node.runs_at(step):
                    self.ready.remove(entry)
                    self._finish(name, step, None)
                    progressed = True
                    break
                if name in self.following and (name, step) not in self.launched:
                    self.ready.remove(entry)
                    self.in_flight += 1
                    self.launched.add((name, step))
                    self.runner.follow(node, step)
                    progressed = True
                    break
                pools = self.runner.pools_of(node)
                if claimed.isdisjoint(pools):
                    self.ready.remove(entry)
                    self._start(node, step, pools)
                    progressed = True
                    break
                self._ask_for(pools, claimed, entry)
                claimed.update(pools)

    def _start(self, node: Node, step: int, pools: tuple[str, ...]) -> None:
        self.busy.update(dict.fromkeys(pools, (node.name, step)))
        self.in_flight += 1
        self.runner.launch(node, step)
        if (node.name, step) not in self.launched:
            self.launched.add((node.name, step))
            self._count_down([(target, step) for source, target in self.streamed if source == node.name])

    def _ask_for(self, pools: tuple[str, ...], claimed: set[str], entry: tuple[int, int, str]) -> None:
        """Tell the runner of a node that waits for a younger one only: that one may be one to interrupt."""
        holders = {self.busy[pool] for pool in pools if pool in self.busy}
        if len(holders) != 1 or any(pool not in self.busy for pool in pools if pool in claimed):
            return
        name, step = holders.pop()
        if entry < (step, self.position[name], name):
            self.runner.interrupt(self.nodes[name], step)

    def _take(self, finished: Finished) -> None:
        self.busy = {pool: at for pool, at in self.busy.items() if at != (finished.node, finished.step)}
        if finished.waits:
            self.reports[finished.step].nodes.append(finished)
            return
        self.in_flight -= 1
        if finished.interrupted:
            self.reports[finished.step].nodes.append(finished)
            self._make_ready(finished.node, finished.step)
        else:
            self._finish(finished.node, finished.step, finished)

    def _finish(self, name: str, step: int, finished: Finished | None) -> None:
        self.done.add((name, step))
        if finished:
            self.reports[step].nodes.append(finished)
        self._count_down(
            [
                (target, step + distance)
                for target, distance in self.after[name]
                if (name, target) not in self.streamed or (name, step) not in self.launched
            ]
        )

    def _count_down(self, instances: list[tuple[str, int]]) -> None:
        for instance in instances:
            if instance in self.waiting:
                self.waiting[instance] -= 1
                if self.waiting[instance] == 0:
                    self._make_ready(*instance)

    def _close_finished(self) -> bool:
        closed = False
        while self.closed < self.opened and all((name, self.closed) in self.done for name in self.nodes):
            step = self.closed
            self.runner.end_step(step)
            self.on_step(self.reports.pop(step))
            for name in self.nodes:
                self.waiting.pop((name, step), None)
            self.closed += 1
            oldest = self.closed - max((d for pairs in self.before.values() for _, d in pairs), default=0)
            self.done = {(name, at) for name, at in self.done if at >= oldest}
            self.launched = {(name, at) for name, at in self.launched if at > step}
            closed = True
        return closed
