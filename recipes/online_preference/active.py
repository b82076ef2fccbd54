"""Active preference learning (Muldrew et al. 2024, arXiv 2402.08114): what is labelled is chosen first.

    1. of all prompts, the half whose responses the policy is least sure of (mean entropy of a token)
    2. of these, the half whose two responses are furthest apart in beta log pi/pi_ref: sure, and worth a check
    3. the oracle labels these pairs alone, then DPO

The oracle is the reward. A step draws data.prompts_per_step prompts and trains on a quarter of them.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import dpo
from rlhf_dist.algorithms.ragged import sum_rows
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import keep_best_and_worst

PAPERS = {
    "active": Paper(
        title="Active preference learning (APL)",
        year=2024,
        arxiv="2402.08114",
        rows=(75,),
        needs=("ROLL", "SAMP", "JUDGE", "PREF", "REF"),
        assumed="both shares 1/2; a reward is the oracle; the entropy is that of the drawn responses' tokens",
    )
}


@dataclass(frozen=True, kw_only=True)
class Active:
    """Settings of active preference learning."""

    beta: float = 0.1
    """Strength of the pull towards the reference."""
    unsure_share: float = 0.5
    """Of the prompts, those with the most entropy."""
    apart_share: float = 0.5
    """Of these, those whose responses are furthest apart."""


@host_op(reads=("entropy", "response_mask", "group_id"), rows="drop", scope="batch")
def most_unsure(batch: Batch, *, share: float) -> HostResult:
    """The groups with the largest mean entropy of a token."""
    mask = batch["response_mask"]
    entropy = sum_rows(batch["entropy"].values * (mask.values > 0), mask.offsets)
    tokens = sum_rows(mask.values > 0, mask.offsets)
    return largest(batch, [entropy[rows].sum() / max(tokens[rows].sum(), 1) for rows in batch.group()], share)


@host_op(reads=("old_log_probs", "ref_log_probs", "response_mask", "group_id"), rows="drop", scope="batch")
def furthest_apart(batch: Batch, *, share: float) -> HostResult:
    """The groups whose responses differ most in log pi/pi_ref."""
    mask = batch["response_mask"]
    gap = (batch["old_log_probs"].values - batch["ref_log_probs"].values) * (mask.values > 0)
    ratio = sum_rows(gap, mask.offsets)
    return largest(batch, [np.ptp(ratio[rows]) for rows in batch.group()], share)


def largest(batch: Batch, scores: list[float], share: float) -> HostResult:
    """The `share` of groups with the largest scores, one at least."""
    groups = batch.group()
    many = min(len(groups), max(1, round(share * len(groups))))
    best = np.argsort(-np.asarray(scores), kind="stable")[:many]
    keep = np.sort(np.concatenate([groups[at] for at in best])) if many else np.empty(0, np.int64)
    return HostResult(columns=Batch({}, len(keep)), keep=keep)


@recipe
def active(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: Active) -> None:
    """DPO on the pairs that are worth a label."""
    batch = actor.compute_log_prob(actor.generate_sequences(prompts, n=2))
    batch = reference.compute_ref_log_prob(most_unsure(batch, share=cfg.unsure_share))
    batch = furthest_apart(batch, share=cfg.apart_share)
    actor.update_actor(keep_best_and_worst(reward.compute_reward(batch)), loss=dpo(cfg.beta))
