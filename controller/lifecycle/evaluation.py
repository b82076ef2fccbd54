"""Evaluation on held-out rows: the greedy response to every prompt, scored by the run's reward role."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from controller.execution.executor import StepReport, run_steps
from controller.lifecycle.session import HELDOUT, Session
from rlhf_dist.compose import Launch
from rlhf_dist.dataflow.graph import Dataflow
from rlhf_dist.dataflow.passes import insert_rollout_dump
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.roles import Prompts, ops_of

SCORE = "compute_reward"


class Evaluation:
    """Evaluates every role of a session that generates and learns (every role that generates, where none learns).

    It needs held-out rows, and who scores them: the role called `reward`, or the only one that gives rewards.
    """

    def __init__(self, session: Session, rollouts: Path | None = None, check: Callable[[], None] | None = None) -> None:
        """rollouts: the folder that gets all responses after N steps, in heldout/step_N.parquet (heldout/ROLE/... of
        several roles); None keeps none. check: see RayRunner."""
        self._session, self._check = session, check
        players, scorer = _players(session.launch), _scorer(session.launch)
        self.possible = HELDOUT in session.groups and bool(players) and scorer is not None
        self._dataflows: dict[str, Dataflow] = {}
        for role in players if self.possible else ():
            assert scorer is not None, "who scores is part of what is possible"
            prefix = HELDOUT if len(players) == 1 else f"{HELDOUT}/{role}"
            dataflow = trace(_game(session.launch, role, scorer))
            if rollouts is not None:
                folder = str((rollouts / prefix).resolve())
                dataflow = insert_rollout_dump(dataflow, folder=folder, rows=sys.maxsize, every=1)
            self._dataflows[prefix] = dataflow

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


def _players(launch: Launch) -> list[str]:
    generating = launch.dataflow.generating
    return [role for role in generating if launch.dataflow.facts[role].trained] or list(generating)


def _scorer(launch: Launch) -> str | None:
    scoring = [role for role in launch.used_roles if SCORE in ops_of(launch.recipe.roles[role])]
    return "reward" if "reward" in scoring else scoring[0] if len(scoring) == 1 else None


def _game(launch: Launch, player: str, scorer: str) -> Recipe:
    """The recipe of an evaluation: mean reward of the most likely response."""

    def evaluate(**given: Any) -> None:
        batch = given[player].generate_sequences(given["prompts"], greedy=True)
        getattr(given[scorer], SCORE)(batch)

    roles = {role: launch.recipe.roles[role] for role in (player, scorer)}
    return Recipe(evaluate, "evaluate", Path(__file__), {"prompts": Prompts}, roles, {}, None)
