"""Evaluation on held-out rows, between steps: the graphs of `rlhf_dist/held_out.py`, run with the weights of a step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

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
        for role, recipe in recipes.items():
            prefix = HELDOUT if len(recipes) == 1 else f"{HELDOUT}/{role}"
            dataflow = trace(recipe)
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
        for prefix, dataflow in self._dataflows.items():
            reports: list[StepReport] = []
            runner = self._session.runner(dataflow, numbers, check=self._check, prompts=HELDOUT)
            run_steps(dataflow, runner, start=step, stop=step + 1, on_step=reports.append)
            metrics = reports[0].metrics.items()
            found |= {f"{prefix}/{name.split('/', 1)[1]}": v for name, v in metrics if not name.startswith("prompts/")}
        return found
