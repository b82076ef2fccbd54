"""A live run, line by line: the recipe is called with handles whose ops run at once.

    rlhf-dist run ppo --eager        breakpoint() stops between two ops; batch.fetch("rewards") shows data

The recipe is traced before, to know its roles, without stopping or printing anything (`trace.rehearsal`).
The same nodes as in the graph, executed in the recipe's order on the same workers; the end result is
the same to the last bit. Generation asks first whether the weights it holds are the trained ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from controller.executor import StepReport
from controller.ray_runner import RayRunner
from rlhf_dist.batch import Batch
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.dataflow.passes import reshard_node
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.dataflow.trace import run_traced


def run_eagerly(
    recipe: Recipe, cfg: Any, runner: RayRunner, *, start: int, stop: int, on_step: Callable[[StepReport], None]
) -> None:
    """Run steps start..stop-1 of `recipe`, each op as its line is reached."""
    for step in range(start, stop):
        report = StepReport(step)

        def execute(node: Node, step: int = step, report: StepReport = report) -> None:
            if node.runs_at(step):
                report.nodes.append(runner.run_node(node, step))

        def fetch(node: str, column: str, step: int = step) -> Any:
            return _fetch(runner, node, column, step)

        tracer = run_traced(recipe, cfg, execute, fetch)
        read = {state for node in tracer.nodes for state in node.weights_read}
        written = {state for node in tracer.nodes for state in node.weights_written}
        for role in (role for role in recipe.roles if f"{role}.train" in written and f"{role}.rollout" in read):
            report.nodes.append(runner.run_node(reshard_node(role), step))
        runner.end_step(step)
        if not report.nodes:
            raise RuntimeError(f"recipe {recipe.name} ran no op at step {step}")
        on_step(report)


def _fetch(runner: RayRunner, node: str, column: str, step: int) -> Any:
    stored = runner.outputs.batch(node, step).columns[column]
    objects: list[Batch] = ray.get(list(stored.at.refs), timeout=60.0)
    return [objects[o][stored.name].row(int(r)) for o, r in zip(stored.at.object_of, stored.at.row_of, strict=True)]
