"""PPO-max (Zheng et al. 2023, arXiv 2307.04964): PPO with the bundle of what keeps it stable.

    r' = clip((r - mean) / std, -d, d)       mean and std of all rewards so far
    r_t = r' 1[t = T] - eta log pi/pi_ref    the policy starts, and stays, near the SFT model
    L = L_PPO - c log pi(pretraining text)   so that it stays a language model

with clipped values, clipped gradients, and a critic that learns alone at first.
"""

from dataclasses import dataclass

import numpy as np

from recipes.policy_gradient._critic import WithCritic
from rlhf_dist.algorithms import nll, ppo_clip, value_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Critic, Examples, Prompts, Reference, Reward, State, state_op
from rlhf_dist.transforms import gae, whiten

PAPERS = {
    "ppo_max": Paper(
        title="Secrets of RLHF I: PPO-max",
        year=2023,
        arxiv="2307.04964",
        rows=(9,),
        needs=("ROLL", "RM", "REF", "CRIT", "ADV", "AUX", "SHAPE"),
        assumed="the weight 0.1 of the pretraining loss, the reward clip 5 and 20 steps of the critic alone",
    )
}


@dataclass(frozen=True, kw_only=True)
class PPOMax(WithCritic):
    """Settings of PPO-max."""

    reward_clip: float = 5.0
    """Normalised rewards are cut to +- this."""
    pretraining_coef: float = 0.1
    """c, weight of the pretraining text's likelihood."""
    critic_warmup: int = 20
    """Steps in which only the critic learns."""
    kl_coef: float = 0.05
    """eta, penalty on log pi - log pi_ref of each token."""


class Rewards(State):
    """Count, mean and sum of squared distances of all rewards so far (Welford)."""

    def initial(self, cfg: PPOMax) -> dict[str, float]:
        return {"count": 0.0, "mean": 0.0, "squares": 0.0}

    @state_op(reads=("rewards",), writes=("rewards",))
    def normalise(self, values: dict[str, float], batch: Batch, *, clip: float) -> tuple[dict[str, float], HostResult]:
        """(r - mean) / std, this batch's rewards included, cut to +- clip; the std counts as 1 while it is 0."""
        rewards = batch["rewards"].values.astype(np.float64)
        count, added = values["count"] + len(rewards), len(rewards)
        gap = (rewards.mean() if added else 0.0) - values["mean"]
        mean = values["mean"] + gap * added / max(count, 1)
        squares = values["squares"] + rewards.var() * added + gap**2 * values["count"] * added / max(count, 1)
        deviation = (squares / max(count, 1)) ** 0.5 or 1.0
        column = Column(((rewards - mean) / deviation).clip(-clip, clip).astype(np.float32))
        metrics = {"raw_reward": Mean(float(rewards.sum()), float(added))}
        return {"count": count, "mean": mean, "squares": squares}, HostResult(
            columns=Batch({"rewards": column}), metrics=metrics
        )


@recipe
def ppo_max(
    prompts: Prompts,
    pretraining: Examples,
    actor: Actor,
    critic: Critic,
    reference: Reference,
    reward: Reward,
    scale: Rewards,
    cfg: PPOMax,
) -> None:
    """PPO with normalised rewards and a pretraining loss."""
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = scale.normalise(batch, clip=cfg.reward_clip)
    batch = critic.compute_values(reference.compute_ref_log_prob(actor.compute_log_prob(batch)))
    batch = whiten(gae(batch, gamma=cfg.gamma, lam=cfg.lam, kl_coef=cfg.kl_coef))
    critic.update_critic(batch, loss=value_clip(cfg.value_clip), mini_batches=cfg.mini_batches)
    terms = [(batch, ppo_clip(cfg.clip)), (pretraining, nll(), cfg.pretraining_coef)]
    actor.update_actor(terms, mini_batches=cfg.mini_batches, after=cfg.critic_warmup)
