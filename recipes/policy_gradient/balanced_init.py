"""BAI: a balanced start of the actor (Zheng et al. 2025, arXiv 2509.00309): a merge in two stages, then PPO.

    theta = b [a instruct + (1 - a) reasoner] + (1 - b) pretrained

The instruct model and the one that was distilled to reason are averaged, and what comes out with the pretrained model,
which has kept what fine-tuning takes away. The merge is made at the first step.
"""

from dataclasses import dataclass

from recipes.policy_gradient.salsa import ONCE
from rlhf_dist.algorithms import ppo_clip, value_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Critic, Prompts, Reference, Reward
from rlhf_dist.transforms import gae, whiten

PAPERS = {
    "balanced_init": Paper(
        title="BAI: balanced actor initialisation",
        year=2025,
        arxiv="2509.00309",
        rows=(192,),
        needs=("SNAP", "ROLL", "RM", "CRIT"),
        assumed="both shares 0.5",
    )
}


@dataclass(frozen=True, kw_only=True)
class Balanced:
    """Settings of PPO from a merged start."""

    instruct_share: float = 0.5
    """a: of the instruct model beside the reasoner."""
    tuned_share: float = 0.5
    """b: of these two beside the pretrained model."""
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


@recipe
def balanced_init(
    prompts: Prompts,
    actor: Actor,
    critic: Critic,
    instruct: Reference,
    reasoner: Reference,
    pretrained: Reference,
    reward: Reward,
    cfg: Balanced,
) -> None:
    """PPO from an average of three models."""
    tuned = cfg.tuned_share
    shares = (tuned * cfg.instruct_share, tuned * (1 - cfg.instruct_share), 1 - tuned)
    actor.merge_from(list(zip((instruct, reasoner, pretrained), shares, strict=True)), every=ONCE)
    batch = actor.compute_log_prob(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = critic.compute_values(reward.compute_reward(batch))
    batch = whiten(gae(batch, gamma=cfg.gamma, lam=cfg.lam))
    critic.update_critic(batch, loss=value_clip(cfg.value_clip), mini_batches=cfg.mini_batches)
    actor.update_actor(batch, loss=ppo_clip(cfg.clip), mini_batches=cfg.mini_batches)
