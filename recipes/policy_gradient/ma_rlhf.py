"""MA-RLHF: macro actions (Chai et al. 2024, arXiv 2410.02743): PPO whose steps are n tokens instead of one.

The value of a segment is the mean of its tokens', its reward their sum; GAE runs over segments, and every token of a
segment has the segment's advantage and, for the critic, its return.
"""

from dataclasses import dataclass

import numpy as np

from recipes.policy_gradient._critic import WithCritic
from rlhf_dist.algorithms import ppo_clip, value_clip
from rlhf_dist.algorithms.advantages.gae import gae as gae_formula
from rlhf_dist.algorithms.ragged import row_of_token
from rlhf_dist.algorithms.shaping import place_terminal
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Critic, Prompts, Reference, Reward
from rlhf_dist.transforms import whiten

PAPERS = {
    "ma_rlhf": Paper(
        title="MA-RLHF",
        year=2024,
        arxiv="2410.02743",
        rows=(23,),
        needs=("ROLL", "RM", "CRIT", "ADV", "TOK"),
        assumed="macro actions of n tokens; not by parse or perplexity",
    )
}


@dataclass(frozen=True, kw_only=True)
class MARLHF(WithCritic):
    """Settings of MA-RLHF."""

    gamma: float = 1.0
    """Discount per segment."""
    segment: int = 5
    """Tokens of a macro action; 1 is PPO."""
    kl_coef: float = 0.05
    """Penalty on log pi - log pi_ref, added to each token's reward."""


@host_op(
    reads=("rewards", "values", "response_mask", "old_log_probs", "ref_log_probs"), writes=("advantages", "returns")
)
def segment_gae(batch: Batch, *, segment: int, gamma: float, lam: float, kl_coef: float) -> Batch:
    """GAE over segments of `segment` tokens; the last of a response may be shorter. All tokens count."""
    mask, offsets = batch["response_mask"].values, batch["response_mask"].offsets
    token_rewards = place_terminal(batch["rewards"].values, offsets, mask)
    token_rewards -= kl_coef * (batch["old_log_probs"].values - batch["ref_log_probs"].values)
    row = row_of_token(offsets)
    within = (np.arange(len(mask)) - offsets[row]) // segment
    starts = np.concatenate([[0], np.cumsum(-(-np.diff(offsets) // segment))])
    at = starts[row] + within
    size = np.maximum(np.bincount(at, minlength=starts[-1]), 1)
    rewards = np.bincount(at, token_rewards, starts[-1]).astype(np.float32)
    values = (np.bincount(at, batch["values"].values, starts[-1]) / size).astype(np.float32)
    advantages, returns = gae_formula(rewards, values, starts, np.ones(starts[-1]), gamma, lam)
    return Batch({"advantages": Column(advantages[at], offsets), "returns": Column(returns[at], offsets)})


@recipe
def ma_rlhf(prompts: Prompts, actor: Actor, critic: Critic, reference: Reference, reward: Reward, cfg: MARLHF) -> None:
    """PPO over macro actions."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = critic.compute_values(actor.compute_log_prob(batch))
    batch = reward.compute_reward(reference.compute_ref_log_prob(batch))
    batch = segment_gae(batch, segment=cfg.segment, gamma=cfg.gamma, lam=cfg.lam, kl_coef=cfg.kl_coef)
    batch = whiten(batch)
    critic.update_critic(batch, loss=value_clip(cfg.value_clip), mini_batches=cfg.mini_batches)
    actor.update_actor(batch, loss=ppo_clip(cfg.clip), mini_batches=cfg.mini_batches)
