"""A live run, line by line: the recipe is called with handles whose ops run at once.

    rlhf-dist run ppo --eager        breakpoint() stops between two ops; batch.fetch("rewards") shows data

The recipe is traced before, to know its roles, without stopping or printing anything (`trace.rehearsal`).
The same nodes as in the graph, executed in the recipe's order on the same workers; the end result is
the same to the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from controller.execution.executor import Finished, StepReport
from controller.execution.ray_runner import RayRunner
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.dataflow.passes import reshard_node
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.dataflow.trace import run_traced


def run_eagerly(
    recipe: Recipe,
    cfg: Any,
    runner: RayRunner,
    *,
    start: int,
    stop: int,
    on_step: Callable[[StepReport], None],
    refilled: Collection[str] = (),
    at_the_end: Sequence[Node] = (),
) -> None:
    """Run steps start..stop-1 of `recipe`, each op as its line is reached. refilled: see `Dataflow.refilled`.

    at_the_end: nodes that a pass put into the graph, which no line of the recipe stands for.
    """
    for step in range(start, stop):
        report, syncs = StepReport(step), _Syncs(recipe, runner, step)

        def execute(node: Node, step: int = step, report: StepReport = report, syncs: _Syncs = syncs) -> None:
            report.nodes += syncs.before(node)
            if node.runs_at(step):
                report.nodes.append(runner.run_node(node, step))

        def fetch(node: str, column: str, step: int = step) -> Any:
            return _fetch(runner, node, column, step)

        run_traced(recipe, cfg, execute, fetch, refilled)
        report.nodes += [runner.run_node(node, step) for node in at_the_end if node.runs_at(step)]
        report.nodes += syncs.at_the_end()
        runner.end_step(step)
        if not report.nodes:
            raise RuntimeError(f"recipe {recipe.name} ran no op at step {step}")
        on_step(report)


class _Syncs:
    """The weight syncs of one step: those that `passes.insert_reshard` would put into its graph."""

    def __init__(self, recipe: Recipe, runner: RayRunner, step: int) -> None:
        self._recipe, self._runner, self._step = recipe, runner, step
        self._writers: dict[str, list[Node]] = {}
        """Role -> what writes its weights, since its last sync."""
        self._generated: set[str] = set()
        self._done: Counter[str] = Counter()

    def before(self, node: Node) -> list[Finished]:
        """Sync what `node` generates with, if its role's weights have been written in this step."""
        reads = {role for role in self._recipe.roles if f"{role}.rollout" in node.weights_read}
        self._generated |= reads
        synced = [one for role in reads & self._writers.keys() for one in self._sync(role)]
        for role in self._recipe.roles:
            if f"{role}.train" in node.weights_written:
                self._writers.setdefault(role, []).append(node)
        return synced

    def at_the_end(self) -> list[Finished]:
        """Sync what the next step generates with."""
        due = self._writers.keys() & self._generated
        return [one for role in self._recipe.roles if role in due for one in self._sync(role)]

    def _sync(self, role: str) -> list[Finished]:
        self._done[role] += 1
        node = reshard_node(role, self._done[role], self._writers.pop(role))
        return [self._runner.run_node(node, self._step)] if node.runs_at(self._step) else []


def _fetch(runner: RayRunner, node: str, column: str, step: int) -> Any:
    stored = runner.outputs.batch(node, step).columns[column]
    objects = runner.objects(stored.at.refs)
    return [objects[o][stored.names[o]].row(int(r)) for o, r in zip(stored.at.object_of, stored.at.row_of, strict=True)]
