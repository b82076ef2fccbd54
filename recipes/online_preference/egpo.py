"""EGPO: extragradient preference optimisation (Zhou et al. 2025, arXiv 2503.08942): a half-step, then the step.

    L = (h(y) - h(y') - (P(y > m) - P(y' > m)) / beta)^2       h = log pi - log pi_ref, y, y' ~ pi, m ~ pi_ref

The gradient at theta leads to theta_half; that at theta_half is applied from theta. With weights as values: the step
from theta_half to theta' is added to theta. Both halves use the responses drawn at theta (the paper's distribution of
samples is to be checked), and P is a sigmoid of the difference of rewards.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import loss
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward

PAPERS = {
    "egpo": Paper(
        title="EGPO",
        year=2025,
        arxiv="2503.08942",
        rows=(97,),
        status="outline",
        needs=("ROLL", "PAIRJ", "PREF", "REF", "SNAP", "BRANCH"),
        assumed="both half-steps use the responses drawn at theta; P is a sigmoid of the difference of rewards",
    )
}


@dataclass(frozen=True, kw_only=True)
class EGPO:
    """Settings of EGPO."""

    beta: float = 0.1
    """Strength of the pull towards the reference."""
    scale: float = 1.0
    """Rewards are divided by it before the sigmoid."""


@host_op(reads=("rewards", "their_rewards", "group_id"), writes=("sign", "target"), scope="groups")
def duels(batch: Batch, *, beta: float, scale: float) -> Batch:
    """+1 and -1 for the two rows of a prompt, and for both (P(y > m) - P(y' > m)) / beta, y the first."""
    win = 1 / (1 + np.exp(-(batch["rewards"].values - batch["their_rewards"].values) / scale))
    sign, target = np.zeros((2, batch.num_rows), np.float32)
    for first, second in batch.group():
        sign[[first, second]] = 1, -1
        target[[first, second]] = (win[first] - win[second]) / beta
    return Batch({"sign": Column(sign), "target": Column(target)})


@loss(reads=("ref_log_probs", "sign", "target"), average="groups")
def online_ipo(model, rows):
    """Squared distance of the gap of log-ratios from its target."""
    ratio = rows.sum_tokens(model.log_probs - rows["ref_log_probs"])
    gap = rows.sum_groups(rows["sign"] * ratio)
    target = rows.sum_groups((rows["sign"] > 0) * rows["target"])
    return (gap - target) ** 2, {"gap": gap.detach(), "target": target}


@recipe
def egpo(
    prompts: Prompts,
    actor: Actor,
    reference: Reference,
    start: Reference,
    half: Reference,
    reward: Reward,
    cfg: EGPO,
) -> None:
    """Two gradients on one batch, the second applied from where the first began."""
    anchors = reward.compute_reward(reference.generate_sequences(prompts))
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=2)).join(anchors, their_rewards="rewards")
    batch = duels(reference.compute_ref_log_prob(batch), beta=cfg.beta, scale=cfg.scale)
    start.copy_from(actor)
    actor.update_actor(batch, loss=online_ipo())
    half.copy_from(actor)
    actor.update_actor(batch, loss=online_ipo())
    actor.merge_from([(start, 1.0), (actor, 1.0), (half, -1.0)])
