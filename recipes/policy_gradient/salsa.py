"""SALSA: a soup of two SFT models as reference (Chegini et al. 2024, arXiv 2411.01798).

    pi_ref = (SFT_1 + SFT_2) / 2, weight by weight, then PPO with its KL to that

The soup is made at the first step and kept in checkpoints; the roles `first` and `second` only give it their weights.
"""

from dataclasses import dataclass

from rlhf_dist.algorithms import ppo_clip, value_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Critic, Prompts, Reference, Reward
from rlhf_dist.transforms import gae, whiten

ONCE = 1 << 40
"""A cadence of which a run sees step 0 only."""


PAPERS = {
    "salsa": Paper(
        title="SALSA",
        year=2024,
        arxiv="2411.01798",
        rows=(191,),
        needs=("SNAP", "REF", "ROLL", "RM", "CRIT"),
    )
}


@dataclass(frozen=True, kw_only=True)
class SALSA:
    """Settings of SALSA."""

    samples_per_prompt: int = 1
    """Responses to each prompt."""
    share: float = 0.5
    """Of the second model in the soup."""
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
    """Penalty on log pi - log pi_ref in the reward."""


@recipe
def salsa(
    prompts: Prompts,
    actor: Actor,
    critic: Critic,
    first: Reference,
    second: Reference,
    soup: Reference,
    reward: Reward,
    cfg: SALSA,
) -> None:
    """PPO near an average of models."""
    soup.merge_from([(first, 1 - cfg.share), (second, cfg.share)], every=ONCE)
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = soup.compute_ref_log_prob(actor.compute_log_prob(batch))
    batch = critic.compute_values(reward.compute_reward(batch))
    batch = whiten(gae(batch, gamma=cfg.gamma, lam=cfg.lam, kl_coef=cfg.kl_coef))
    critic.update_critic(batch, loss=value_clip(cfg.value_clip), mini_batches=cfg.mini_batches)
    actor.update_actor(batch, loss=ppo_clip(cfg.clip), mini_batches=cfg.mini_batches)
