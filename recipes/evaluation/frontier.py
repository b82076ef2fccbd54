"""How far a policy has gone and what that is worth (Rafailov et al. 2024, arXiv 2406.02900): laws of overoptimisation.

    KL = E_pi[log pi(y)/pi_ref(y)]          gold = E_pi[r(y)]          win = P(r(y) > r(y')),  y' ~ pi_ref

One run measures one policy; runs over betas, sizes and checkpoints of DPO, IPO and SLiC give win against sqrt(KL).
"""

from dataclasses import dataclass

from rlhf_dist.algorithms.ragged import sum_rows
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Opponent, Prompts, Reference, Reward

PAPERS = {
    "frontier": Paper(
        title="Laws of overoptimisation for direct alignment",
        year=2024,
        arxiv="2406.02900",
        rows=(202,),
        status="study",
        needs=("EVAL", "PREF", "REF"),
        assumed="the laws are fitted to the metrics of several runs elsewhere",
    )
}


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Settings of the measurement."""

    samples_per_prompt: int = 4
    """Responses of the policy to each prompt."""


@host_op(reads=("rewards", "their_rewards", "rollout_log_probs", "ref_log_probs", "response_mask"), scope="batch")
def point(batch: Batch) -> HostResult:
    """The point on the frontier as metrics; a tie is half a win."""
    mask, rows = batch["response_mask"], float(batch.num_rows)
    gap = (batch["rollout_log_probs"].values - batch["ref_log_probs"].values) * (mask.values > 0)
    kl = sum_rows(gap, mask.offsets)
    lead = batch["rewards"].values - batch["their_rewards"].values
    metrics = {
        "kl": Mean(float(kl.sum()), rows),
        "sqrt_kl": Mean(max(0.0, float(kl.mean())) ** 0.5 if batch.num_rows else 0.0),
        "gold_reward": Mean(float(batch["rewards"].values.sum()), rows),
        "win_rate": Mean(float((lead > 0).sum() + 0.5 * (lead == 0).sum()), rows),
    }
    return HostResult(columns=Batch({}, batch.num_rows), metrics=metrics)


@recipe
def frontier(prompts: Prompts, policy: Opponent, reference: Reference, reward: Reward, cfg: Frontier) -> None:
    """KL, reward and win rate of a policy."""
    theirs = reward.compute_reward(reference.generate_sequences(prompts))
    batch = reward.compute_reward(policy.generate_sequences(prompts, n=cfg.samples_per_prompt))
    point(reference.compute_ref_log_prob(batch.join(theirs, their_rewards="rewards")))
