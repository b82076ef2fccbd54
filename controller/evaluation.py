"""Evaluation on held-out rows: the greedy response to every prompt, scored by the run's reward role."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from controller.executor import StepReport, run_steps
from controller.session import HELDOUT, Session
from rlhf_dist.dataflow.passes import insert_rollout_dump
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.roles import Actor, Prompts, Reward


@recipe
def evaluate(prompts: Prompts, actor: Actor, reward: Reward) -> None:
    """Mean reward of the most likely response."""
    batch = actor.generate_sequences(prompts, greedy=True)
    reward.compute_reward(batch)


class Evaluation:
    """Evaluates a session's actor, where it has an actor that generates, a reward and held-out rows."""

    def __init__(self, session: Session, rollouts: Path | None = None) -> None:
        """rollouts: the folder that gets all responses after N steps, in heldout/step_N.parquet; None keeps none."""
        roles = session.launch.recipe.roles
        self.possible = HELDOUT in session.groups and all(name in roles for name in evaluate.roles)
        self._session = session
        self._dataflow = trace(evaluate)
        if rollouts is not None:
            folder = str((rollouts / HELDOUT).resolve())
            self._dataflow = insert_rollout_dump(self._dataflow, folder=folder, rows=sys.maxsize, every=1)

    def run(self, step: int, numbers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Metrics of held-out rows, prefixed `heldout/`; none where there is nothing to evaluate."""
        if not self.possible:
            return {}
        reports: list[StepReport] = []
        runner = self._session.runner(self._dataflow, numbers, prompts=HELDOUT)
        run_steps(self._dataflow, runner, start=step, stop=step + 1, on_step=reports.append)
        metrics = reports[0].metrics
        return {
            f"{HELDOUT}/{name.split('/', 1)[1]}": v for name, v in metrics.items() if not name.startswith("prompts/")
        }
