"""Proximal policy optimisation for language models (Schulman et al. 2017; Ouyang et al. 2022)."""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import ppo_clip, value_clip
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Critic, Prompts, Reference, Reward
from rlhf_dist.transforms import gae, whiten


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Settings of PPO."""

    samples_per_prompt: int = 1
    """Responses to each prompt."""
    mini_batches: int = 4
    """Optimizer steps in one pass over the batch."""
    epochs: int = 1
    """Passes over the batch."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    value_clip: float = 0.2
    """A new value may move this far from the old one; in reward units."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    kl_coef: float = 0.02
    """Penalty on log pi - log pi_ref, added to each token's reward; 0 for none."""
    critic_warmup: int = 0
    """Steps in which only the critic learns."""
    correction: Literal["none", "token", "sequence", "masked"] = "none"
    """Importance correction for rows of an older policy (placement.max_staleness): truncated per token or per
    sequence, masked, or none."""
    correction_cap: float = 2.0
    """Largest importance weight, >= 1."""


@recipe
def ppo(prompts: Prompts, actor: Actor, critic: Critic, reference: Reference, reward: Reward, cfg: PPO) -> None:
    """PPO with a critic, a reference and a reward."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = actor.compute_log_prob(batch)
    batch = critic.compute_values(batch)
    batch = reference.compute_ref_log_prob(batch)
    batch = reward.compute_reward(batch)
    batch = gae(batch, gamma=cfg.gamma, lam=cfg.lam, kl_coef=cfg.kl_coef)
    batch = whiten(batch)
    cuts = {"mini_batches": cfg.mini_batches, "epochs": cfg.epochs}
    critic.update_critic(batch, loss=value_clip(cfg.value_clip), **cuts)
    loss = ppo_clip(cfg.clip, correction=cfg.correction, correction_cap=cfg.correction_cap)
    actor.update_actor(batch, loss=loss, after=cfg.critic_warmup, **cuts)
