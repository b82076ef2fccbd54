"""Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300): no critic, the group is the baseline."""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import grpo_advantage


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Settings of GRPO."""

    samples_per_prompt: int = 8
    """Responses to each prompt: the group."""
    mini_batches: int = 1
    """Optimizer steps in one pass over the batch."""
    epochs: int = 1
    """Passes over the batch."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    kl_coef: float = 0.02
    """Weight of the KL estimate in the loss; 0 for none, and then no reference is held."""
    scale: bool = True
    """Divide by the group's standard deviation (False: Dr. GRPO)."""
    correction: Literal["none", "token", "sequence", "masked"] = "none"
    """Importance correction for rows of an older policy (placement.max_staleness): truncated per token or per
    sequence, masked, or none."""
    correction_cap: float = 2.0
    """Largest importance weight, >= 1."""


@recipe
def grpo(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: GRPO) -> None:
    """GRPO with a KL term towards the reference."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    one_update = cfg.mini_batches * cfg.epochs == 1
    if not one_update:
        batch = actor.compute_log_prob(batch)
    if cfg.kl_coef:
        batch = reference.compute_ref_log_prob(batch)
    batch = reward.compute_reward(batch)
    batch = grpo_advantage(batch, scale=cfg.scale)
    loss = ppo_clip(
        cfg.clip,
        kl_coef=cfg.kl_coef,
        on_policy=one_update,
        correction=cfg.correction,
        correction_cap=cfg.correction_cap,
    )
    actor.update_actor(batch, loss=loss, mini_batches=cfg.mini_batches, epochs=cfg.epochs)
