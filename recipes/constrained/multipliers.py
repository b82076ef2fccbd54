"""Constrained RLHF (Moskovitz et al. 2023, arXiv 2310.04373): several rewards, each as far as it means something.

    max_pi -KL(pi || pi_ref)   s.t.  E[r_i] = theta_i         theta_i: the point from which r_i and the truth part
    A = sum_i mu_i A_i,   mu_i = tanh(lambda_i)
    lambda_i <- lambda_i + lr (theta_i - E[r_i])              up while a reward is under its point, down above it

A reward below its point is raised, one above it lowered. Each has a critic; the KL penalty is in the first's reward.
The points, which the paper finds by Nelder-Mead over short runs, are settings.
"""

from dataclasses import dataclass
from math import tanh

import numpy as np

from recipes.policy_gradient._critic import WithCritic
from rlhf_dist.algorithms import ppo_clip, value_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.roles import Actor, Critic, Prompts, Reference, Reward, State, state_op
from rlhf_dist.transforms import gae, whiten

PAPERS = {
    "multipliers": Paper(
        title="Constrained RLHF",
        year=2023,
        arxiv="2310.04373",
        rows=(147,),
        status="outline",
        needs=("MRM", "STATE", "ROLL", "CRIT", "REF"),
        assumed="two rewards; mu = tanh(lambda); the points are given; a critic for each reward, the KL in the first's",
    )
}


@dataclass(frozen=True, kw_only=True)
class Constrained(WithCritic):
    """Settings of constrained RLHF."""

    first_point: float = 0.5
    """theta of the first reward."""
    second_point: float = 0.5
    """theta of the second."""
    multiplier: float = 0.5
    """lambda of both at the start; the weight is its tanh."""
    multiplier_lr: float = 0.1
    """Step size of lambda."""


class Multipliers(State):
    """lambda and mu of both rewards."""

    def initial(self, cfg: Constrained) -> dict[str, float]:
        mu = tanh(cfg.multiplier)
        return {"first": cfg.multiplier, "second": cfg.multiplier, "mu_first": mu, "mu_second": mu}

    @state_op(reads=("rewards", "second_rewards"))
    def update(
        self, numbers: dict[str, float], batch: Batch, *, first: float, second: float, lr: float
    ) -> tuple[dict[str, float], Metrics]:
        """Towards both points."""
        found, metrics = {}, {}
        for name, column, point in (("first", "rewards", first), ("second", "second_rewards", second)):
            mean = float(batch[column].values.mean(dtype="float64")) if batch.num_rows else point
            found[name] = numbers[name] + lr * (point - mean)
            found[f"mu_{name}"] = tanh(found[name])
            metrics |= {f"{name}_reward": Mean(mean), f"mu_{name}": Mean(found[f"mu_{name}"])}
        return found, metrics


@host_op(reads=("advantages", "second_advantages"), writes=("advantages",))
def weighed(batch: Batch, *, first: float, second: float) -> Batch:
    """mu_1 A_1 + mu_2 A_2."""
    total = first * batch["advantages"].values + second * batch["second_advantages"].values
    return Batch({"advantages": Column(total.astype(np.float32), batch["advantages"].offsets)})


@recipe
def multipliers(
    prompts: Prompts,
    actor: Actor,
    critic: Critic,
    second_critic: Critic,
    reference: Reference,
    reward: Reward,
    second: Reward,
    weights: Multipliers,
    cfg: Constrained,
) -> None:
    """PPO on two rewards whose weights learn."""
    batch = actor.compute_log_prob(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = reward.compute_reward(reference.compute_ref_log_prob(batch))
    batch = second.compute_reward(batch, out="second_rewards")
    batch = second_critic.compute_values(critic.compute_values(batch), out="second_values")
    other = gae(batch.rename(rewards="second_rewards", values="second_values"), gamma=cfg.gamma, lam=cfg.lam)
    batch = gae(batch, gamma=cfg.gamma, lam=cfg.lam, kl_coef=cfg.kl_coef)
    weights.update(batch, first=cfg.first_point, second=cfg.second_point, lr=cfg.multiplier_lr)
    batch = batch.with_columns_of(other, second_advantages="advantages")
    own = whiten(weighed(batch, first=weights.value("mu_first"), second=weights.value("mu_second")))
    critic.update_critic(batch, loss=value_clip(cfg.value_clip), mini_batches=cfg.mini_batches)
    second_critic.update_critic(other, loss=value_clip(cfg.value_clip), mini_batches=cfg.mini_batches)
    actor.update_actor(own, loss=ppo_clip(cfg.clip), mini_batches=cfg.mini_batches)
