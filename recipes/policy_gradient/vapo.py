"""VAPO: value-based augmented PPO (Yue et al. 2025, arXiv 2504.05118): PPO for long chains of thought.

lambda_critic = 1,   lambda_policy = 1 - 1 / (a l),  l the response's tokens        length-adaptive, decoupled GAE
L = token-mean of PPO's loss, cut at 1 - 0.2 and 1 + 0.28,  - mu log pi(y) over the right responses
several responses to a prompt; the critic learns alone at first, from returns of what the policy then says
"""

from dataclasses import dataclass

import numpy as np

from recipes.policy_gradient.rejection import right_ones
from rlhf_dist.algorithms import nll, ppo_clip, value_clip
from rlhf_dist.algorithms.advantages.gae import gae as gae_formula
from rlhf_dist.algorithms.shaping import place_terminal
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Critic, Prompts, Reward
from rlhf_dist.transforms import whiten

PAPERS = {
    "vapo": Paper(
        title="VAPO",
        year=2025,
        arxiv="2504.05118",
        needs=("ROLL", "VER", "CRIT", "ADV", "AUX", "FILT"),
        assumed="advantages are whitened; 50 steps of the critic alone",
    )
}


@dataclass(frozen=True, kw_only=True)
class VAPO:
    """Settings of VAPO."""

    samples_per_prompt: int = 16
    """Responses to each prompt."""
    alpha: float = 0.05
    """a of the policy's lambda."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip."""
    clip_high: float = 0.28
    """And at 1 + clip_high."""
    likelihood_coef: float = 0.1
    """mu, weight of the right responses' likelihood."""
    right: float = 1.0
    """A reward from which on a response is right."""
    critic_warmup: int = 50
    """Steps in which only the critic learns."""
    mini_batches: int = 4
    """Optimizer steps in one pass over the batch."""


@host_op(reads=("rewards", "values", "response_mask"), writes=("advantages", "returns"))
def decoupled_gae(batch: Batch, *, alpha: float) -> Batch:
    """Advantages with lambda = 1 - 1 / (alpha l), 0 at least, for each row; returns with lambda 1: what is to come."""
    mask = batch["response_mask"]
    said, offsets = batch["values"].values, mask.offsets
    rewards = place_terminal(batch["rewards"].values, offsets, mask.values)
    advantages = np.zeros(len(said), np.float32)
    for row, length in enumerate(mask.lengths):
        part = slice(int(offsets[row]), int(offsets[row + 1]))
        lam = max(0.0, 1 - 1 / (alpha * max(int(length), 1)))
        whole = np.array([0, length])
        advantages[part], _ = gae_formula(rewards[part], said[part], whole, mask.values[part], 1.0, lam)
    _, returns = gae_formula(rewards, said, offsets, mask.values, 1.0, 1.0)
    return Batch({"advantages": Column(advantages, offsets), "returns": Column(returns, offsets)})


@recipe
def vapo(prompts: Prompts, actor: Actor, critic: Critic, reward: Reward, cfg: VAPO) -> None:
    """PPO with two lambdas and the likelihood of what was right."""
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = critic.compute_values(actor.compute_log_prob(batch))
    batch = whiten(decoupled_gae(batch, alpha=cfg.alpha))
    critic.update_critic(batch, loss=value_clip(0.0), mini_batches=cfg.mini_batches)
    terms = [
        (batch, ppo_clip(cfg.clip, clip_high=cfg.clip_high)),
        (right_ones(batch, least=cfg.right), nll(), cfg.likelihood_coef),
    ]
    actor.update_actor(terms, mini_batches=cfg.mini_batches, after=cfg.critic_warmup)
