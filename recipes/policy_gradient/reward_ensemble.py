"""Several reward models against overoptimisation (Coste et al. 2023, arXiv 2310.02743).

mean   r = mean_i r_i          WCO   r = min_i r_i          UWO   r = mean_i r_i - lambda var_i r_i
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import grpo_advantage

SCORES = ("score_1", "score_2", "score_3")


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Settings of a policy under three reward models."""

    samples_per_prompt: int = 8
    """Responses to each prompt: the group."""
    combine: Literal["mean", "wco", "uwo"] = "uwo"
    """What becomes of a response's scores."""
    variance_coef: float = 0.1
    """lambda of UWO."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    kl_coef: float = 0.02
    """Penalty on log pi - log pi_ref in the reward."""


@host_op(reads=SCORES, writes=("rewards",))
def combined(batch: Batch, *, combine: str, variance_coef: float) -> HostResult:
    """One reward of several scores; the variance has divisor n."""
    scores = np.stack([batch[name].values for name in SCORES]).astype(np.float64)
    mean, variance = scores.mean(0), scores.var(0)
    rewards = {"mean": mean, "wco": scores.min(0), "uwo": mean - variance_coef * variance}[combine]
    return HostResult(
        columns=Batch({"rewards": Column(rewards.astype(np.float32))}),
        metrics={"score_variance": Mean(float(variance.sum()), batch.num_rows)},
    )


@recipe
def reward_ensemble(
    prompts: Prompts, actor: Actor, reference: Reference, first: Reward, second: Reward, third: Reward, cfg: Ensemble
) -> None:
    """GRPO on what three reward models agree on."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = reference.compute_ref_log_prob(actor.compute_log_prob(batch))
    for model, name in zip((first, second, third), SCORES, strict=True):
        batch = model.compute_reward(batch, out=name)
    batch = combined(batch, combine=cfg.combine, variance_coef=cfg.variance_coef)
    batch = grpo_advantage(batch, kl_coef=cfg.kl_coef)
    actor.update_actor(batch, loss=ppo_clip(cfg.clip, on_policy=True))
