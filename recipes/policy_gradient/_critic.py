"""PPO's second half, for recipes that differ in the reward alone: settings, and what is done with a scored batch."""

from dataclasses import dataclass
from typing import Any, Literal

from rlhf_dist.algorithms import ppo_clip, value_clip
from rlhf_dist.batch import Batch
from rlhf_dist.roles import Actor, Critic, Reference
from rlhf_dist.transforms import gae, whiten


@dataclass(frozen=True, kw_only=True)
class WithCritic:
    """Settings that such recipes share."""

    samples_per_prompt: int = 1
    """Responses to each prompt."""
    mini_batches: int = 4
    """Optimizer steps in one pass over the batch."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    value_clip: float = 0.2
    """A new value may move this far from the old one."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    kl_coef: float = 0.02
    """Penalty on log pi - log pi_ref, in each token's reward."""


def learn_with_critic(
    batch: Batch,
    actor: Actor,
    critic: Critic,
    reference: Reference,
    cfg: WithCritic,
    *,
    dense: bool | Literal["alone"] = False,
) -> None:
    """Log-probs, values, advantages and both updates of rows with `rewards` (dense: and `token_rewards`, see `gae`)."""
    batch = reference.compute_ref_log_prob(actor.compute_log_prob(batch))
    learn_from_log_probs(batch, actor, critic, cfg, kl_coef=cfg.kl_coef, dense=dense)


def learn_from_log_probs(
    batch: Batch, actor: Actor, critic: Critic, cfg: WithCritic, *, kl_coef: Any, dense: bool | Literal["alone"] = False
) -> None:
    """The same of rows that have the policy's and the reference's log-probs. kl_coef: a number, or that of a state."""
    batch = whiten(gae(critic.compute_values(batch), gamma=cfg.gamma, lam=cfg.lam, kl_coef=kl_coef, dense=dense))
    critic.update_critic(batch, loss=value_clip(cfg.value_clip), mini_batches=cfg.mini_batches)
    actor.update_actor(batch, loss=ppo_clip(cfg.clip), mini_batches=cfg.mini_batches)
