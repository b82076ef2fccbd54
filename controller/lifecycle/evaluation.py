"""Evaluation on held-out rows: the graphs of `rlhf_dist/held_out.py`, run with the weights of a step.

between steps    by themselves, all pools at hand (`run`)
beside a step    as nodes of its graph (`rlhf_dist/dataflow/beside.py`), which tell their metrics apart (`of_step`)
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from controller.execution.executor import StepReport, run_steps
from controller.lifecycle.session import Session
from rlhf_dist.dataflow.evaluation_graph import EvaluationGraph
from rlhf_dist.dataflow.passes import insert_rollout_dump
from rlhf_dist.held_out import HELDOUT, evaluation_graphs


class Evaluation:
    """Evaluates the roles of a session that can be: there are held-out rows, and somebody rewards what they do."""

    def __init__(
        self,
        session: Session,
        rollouts: Path | None = None,
        check: Callable[[], None] | None = None,
        *,
        eager: bool = False,
    ) -> None:
        """rollouts: the folder that gets all responses after N steps, in heldout/step_N.parquet (heldout/ROLE/... of
        several roles); None keeps none. check: see RayRunner."""
        self._session, self._check = session, check
        launch = session.launch
        self.graphs: tuple[EvaluationGraph, ...] = ()
        if HELDOUT in session.groups:
            output = launch.run.output
            self.graphs = evaluation_graphs(
                launch.recipe,
                launch.dataflow,
                launch.algorithm,
                every=output.evaluate_every,
                beside=output.evaluate_beside and not eager,
            )
        if rollouts is not None:
            self.graphs = tuple(_dumped(graph, rollouts / graph.name) for graph in self.graphs)

    @property
    def possible(self) -> bool:
        """There is something to evaluate."""
        return bool(self.graphs)

    @property
    def in_vain(self) -> bool:
        """There are held-out rows that nobody can be evaluated on."""
        return HELDOUT in self._session.groups and not self.possible

    @property
    def beside(self) -> tuple[EvaluationGraph, ...]:
        """What runs beside steps."""
        return tuple(graph for graph in self.graphs if graph.beside)

    def due_beside(self, steps_done: int) -> bool:
        """Whether the step after so many has an evaluation of its weights beside it."""
        return any(steps_done % graph.every == 0 for graph in self.beside)

    def of_step(self, report: StepReport) -> tuple[StepReport, dict[str, float]]:
        """What a step did by itself, and the metrics of what was evaluated beside it, as `run` names them."""
        own = StepReport(report.step, [one for one in report.nodes if not _graph_of(one.node, self.beside)])
        found: dict[str, float] = {}
        for graph in self.beside:
            nodes = [one for one in report.nodes if _graph_of(one.node, (graph,))]
            named = _named(StepReport(report.step, nodes).metrics, HELDOUT)
            found |= {f"{graph.name}/{name}": value for name, value in named.items()}
        return own, found

    def run(self, step: int, numbers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Metrics of held-out rows, prefixed `heldout/`, or `heldout/ROLE/` of several roles; none where there is
        nothing to evaluate."""
        found: dict[str, float] = {}
        self._session.sync(step, self._synced_by_no_step)
        for graph in self.graphs:
            reports: list[StepReport] = []
            fed: dict[str, Any] = {graph.source: HELDOUT}
            runner = self._session.runner(graph.dataflow, numbers, check=self._check, **fed)
            run_steps(graph.dataflow, runner, start=step, stop=step + 1, on_step=reports.append)
            named = _named(reports[0].metrics, graph.source)
            found |= {f"{graph.name}/{name}": value for name, value in named.items()}
        return found

    @property
    def _synced_by_no_step(self) -> set[str]:
        """Roles that learn, and generate here alone."""
        here = {role for graph in self.graphs for role in graph.dataflow.generating}
        step = self._session.launch.dataflow
        return {role for role in here if step.facts[role].synced} - {
            node.role for node in step if node.kind == "reshard"
        }


def _graph_of(node: str, graphs: Sequence[EvaluationGraph]) -> EvaluationGraph | None:
    return next((graph for graph in graphs if node.startswith(f"{graph.name}/")), None)


def _dumped(graph: EvaluationGraph, folder: Path) -> EvaluationGraph:
    dataflow = insert_rollout_dump(graph.dataflow, folder=str(folder.resolve()), rows=sys.maxsize, every=1)
    return replace(graph, dataflow=dataflow)


def _named(metrics: Mapping[str, float], source: str) -> dict[str, float]:
    """Without the name of the node that told each, unless several told one of that name; those of rows aside."""
    told = {name: value for name, value in metrics.items() if not name.startswith(f"{source}/")}
    short = {name: name.split("/", 1)[1] for name in told}
    times = Counter(short.values())
    return {name if times[short[name]] > 1 else short[name]: value for name, value in told.items()}
