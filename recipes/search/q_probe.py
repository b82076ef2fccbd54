"""Q-Probe (Li et al. 2024, arXiv 2402.14688): a linear probe on the embeddings of a frozen policy's own responses.

    q(x, y) = w . phi(x, y);   one of k responses is taken with probability softmax(q / beta)
    w = argmin sum (w . phi - r)^2 + ridge |w|^2         reward regression, over all responses seen so far

phi is the model's last state at the response's last token. Only w learns, in closed form: it is state of the recipe.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Opponent, Prompts, Reward, State, state_op
from rlhf_dist.transforms.columns import at_last_token

PAPERS = {
    "q_probe": Paper(
        title="Q-Probe, reward regression",
        year=2024,
        arxiv="2402.14688",
        rows=(195,),
        status="outline",
        needs=("HID", "ROLL", "RM", "VER", "ADV"),
        assumed="beta 0.1, ridge 1, k 8; the state before the last token; no importance-weighted policy gradient",
    )
}


@dataclass(frozen=True, kw_only=True)
class QProbe:
    """Settings of the probe."""

    samples_per_prompt: int = 8
    """k: responses of the frozen policy that the probe chooses from."""
    beta: float = 0.1
    """Temperature of the choice."""
    ridge: float = 1.0
    """Weight of |w|^2."""


class Probe(State):
    """The sums that w solves: phi phi' and r phi."""

    def initial(self, cfg: Any) -> dict[str, Any]:
        return {"moments": np.zeros((0, 0)), "targets": np.zeros(0)}

    @state_op(reads=("hidden", "response_mask", "rewards", "group_id"))
    def learn(
        self, values: dict[str, Any], batch: Batch, *, beta: float, ridge: float
    ) -> tuple[dict[str, Any], HostResult]:
        """Chooses with the probe as it is, measures what that gives, then adds these rows to it."""
        phi, rewards = at_last_token(batch, "hidden"), batch["rewards"].values.astype(np.float64)
        size = phi.shape[1]
        moments, targets = values["moments"], values["targets"]
        if moments.shape != (size, size):
            moments, targets = np.zeros((size, size)), np.zeros(size)
        probe = np.linalg.solve(moments + ridge * np.eye(size), targets)
        gained, errors = expected_reward(phi @ probe, rewards, batch.group(), beta), (phi @ probe - rewards) ** 2
        made = {"moments": moments + phi.T @ phi, "targets": targets + phi.T @ rewards}
        metrics = {
            "reward": Mean(float(rewards.sum()), float(len(rewards))),
            "probed_reward": Mean(float(gained.sum()), float(len(gained))),
            "squared_error": Mean(float(errors.sum()), float(len(errors))),
        }
        return made, HostResult(columns=Batch({}, batch.num_rows), metrics=metrics)


def expected_reward(scores: Any, rewards: Any, groups: list[Any], beta: float) -> Any:
    """[G] the mean reward of a response of each group taken with probability softmax(score / beta)."""
    gained = []
    for rows in groups:
        weights = np.exp((scores[rows] - scores[rows].max()) / beta)
        gained.append(float(weights @ rewards[rows] / weights.sum()))
    return np.array(gained)


@recipe
def q_probe(prompts: Prompts, policy: Opponent, reward: Reward, probe: Probe, cfg: QProbe) -> None:
    """A linear probe that chooses among responses."""
    batch = reward.compute_reward(policy.generate_sequences(prompts, n=cfg.samples_per_prompt))
    probe.learn(policy.compute_hidden(batch), beta=cfg.beta, ridge=cfg.ridge)
