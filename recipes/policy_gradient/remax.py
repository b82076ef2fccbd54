"""ReMax (Li et al. 2023, arXiv 2310.10505): the greedy response's reward is the baseline, no critic."""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import policy_gradient
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import remax_advantage

PAPERS = {
    "remax": Paper(
        title="ReMax",
        year=2023,
        arxiv="2310.10505",
        rows=(16,),
        needs=("ROLL", "RM", "REF", "ADV"),
    )
}


@dataclass(frozen=True, kw_only=True)
class ReMax:
    """Settings of ReMax."""

    kl_coef: float = 0.02
    """Penalty on the KL estimate in the reward; 0 for none, and then no reference is held."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """Estimator of the KL in the reward; k1 is log pi - log pi_ref."""
    kl_cap: float = 0.0
    """Largest penalised KL estimate of a token, nats; 0 for none."""
    correction: Literal["none", "token", "sequence", "masked", "geometric"] = "none"
    """Importance correction for rows of an older policy (placement.max_staleness): truncated per token or per
    sequence, masked per token, responses left out by their geometric mean, or none."""
    correction_cap: float = 2.0
    """Largest importance weight (of geometric: mean), >= 1."""


@recipe
def remax(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: ReMax) -> None:
    """Policy gradient against the reward of the greedy response."""
    batch = actor.generate_sequences(prompts)
    greedy = actor.generate_sequences(prompts, greedy=True)
    if cfg.kl_coef:
        batch = actor.compute_log_prob(batch)
        batch = reference.compute_ref_log_prob(batch)
    batch = reward.compute_reward(batch)
    greedy = reward.compute_reward(greedy)
    batch = batch.join(greedy, baseline_rewards="rewards")
    batch = remax_advantage(batch, kl_coef=cfg.kl_coef, kl_estimator=cfg.kl_estimator, kl_cap=cfg.kl_cap)
    loss = policy_gradient(correction=cfg.correction, correction_cap=cfg.correction_cap)
    actor.update_actor(batch, loss=loss)
