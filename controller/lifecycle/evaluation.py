"""Evaluation on held-out rows, between steps: the graphs of `rlhf_dist/held_out.py`, run with the weights of a step."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from controller.execution.executor import StepReport, run_steps
from controller.lifecycle.session import HELDOUT, Session
from rlhf_dist.dataflow.graph import Dataflow
from rlhf_dist.dataflow.passes import insert_rollout_dump
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.held_out import evaluations


class Evaluation:
    """Evaluates the roles of a session that can be: there are held-out rows, and somebody rewards what they do."""

    def __init__(self, session: Session, rollouts: Path | None = None, check: Callable[[], None] | None = None) -> None:
        """rollouts: the folder that gets all responses after N steps, in heldout/step_N.parquet (heldout/ROLE/... of
        several roles); None keeps none. check: see RayRunner."""
        self._session, self._check = session, check
        recipes = evaluations(session.launch) if HELDOUT in session.groups else {}
        self.possible = bool(recipes)
        self._dataflows: dict[str, Dataflow] = {}
        self._sources: dict[str, str] = {}
        for role, recipe in recipes.items():
            prefix = HELDOUT if len(recipes) == 1 else f"{HELDOUT}/{role}"
            dataflow = trace(recipe, session.launch.algorithm if recipe.config is not None else None)
            self._sources[prefix] = next(iter(recipe.sources))
            if rollouts is not None:
                folder = str((rollouts / prefix).resolve())
                dataflow = insert_rollout_dump(dataflow, folder=folder, rows=sys.maxsize, every=1)
            self._dataflows[prefix] = dataflow

    @property
    def in_vain(self) -> bool:
        """There are held-out rows that nobody can be evaluated on."""
        return HELDOUT in self._session.groups and not self.possible

    def run(self, step: int, numbers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Metrics of held-out rows, prefixed `heldout/`, or `heldout/ROLE/` of several roles; none where there is
        nothing to evaluate."""
        found: dict[str, float] = {}
        self._session.sync(step, self._synced_by_no_step)
        for prefix, dataflow in self._dataflows.items():
            reports: list[StepReport] = []
            source = self._sources[prefix]
            fed: dict[str, Any] = {source: HELDOUT}
            runner = self._session.runner(dataflow, numbers, check=self._check, **fed)
            run_steps(dataflow, runner, start=step, stop=step + 1, on_step=reports.append)
            found |= {f"{prefix}/{name}": value for name, value in _named(reports[0].metrics, source).items()}
        return found

    @property
    def _synced_by_no_step(self) -> set[str]:
        """Roles that learn, and generate here alone."""
        here = {role for dataflow in self._dataflows.values() for role in dataflow.generating}
        step = self._session.launch.dataflow
        return {role for role in here if step.facts[role].synced} - {
            node.role for node in step if node.kind == "reshard"
        }


def _named(metrics: Mapping[str, float], source: str) -> dict[str, float]:
    """Without the name of the node that told each, unless several told one of that name; those of rows aside."""
    told = {name: value for name, value in metrics.items() if not name.startswith(f"{source}/")}
    short = {name: name.split("/", 1)[1] for name in told}
    times = Counter(short.values())
    return {name if times[short[name]] > 1 else short[name]: value for name, value in told.items()}
