"""Nash learning from human feedback against an average of earlier policies (Munos et al. 2023, arXiv 2312.00886).

    advantage(y) = P(y > y') - 1/2 - tau log pi(y) / pi_ref(y)          y ~ pi, y' ~ the opponent

The opponent is the exponential moving average of the policy's weights (Nash-EMA-PG); Nash-MD-PG would sample from the
geometric mixture of policy and reference token by token. P is a sigmoid of the difference of rewards.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import policy_gradient
from rlhf_dist.algorithms.ragged import sum_rows
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Opponent, Prompts, Reference, Reward

PAPERS = {
    "nash_md": Paper(
        title="Nash learning from human feedback, against the average of earlier policies",
        year=2023,
        arxiv="2312.00886",
        rows=(93,),
        status="outline",
        needs=("ROLL", "PAIRJ", "REF", "SNAP"),
        assumed=(
            "the opponent is the average of weights (Nash-EMA-PG), no mixture of distributions; P is a "
            "sigmoid of rewards"
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class NashMD:
    """Settings of Nash-EMA-PG."""

    samples_per_prompt: int = 1
    """Responses to each prompt."""
    kl_coef: float = 0.02
    """tau, the price of the log-ratio to the reference."""
    average: float = 0.01
    """Share of the policy in the opponent's weights, a step."""
    scale: float = 1.0
    """Rewards are divided by it before the sigmoid."""


@host_op(reads=("rewards", "their_rewards", "old_log_probs", "ref_log_probs", "response_mask"), writes=("advantages",))
def win_advantage(batch: Batch, *, kl_coef: float, scale: float) -> HostResult:
    """The same number for every token of a response."""
    mask = batch["response_mask"]
    win = 1 / (1 + np.exp(-(batch["rewards"].values - batch["their_rewards"].values) / scale))
    gap = (batch["old_log_probs"].values - batch["ref_log_probs"].values) * (mask.values > 0)
    advantage = win - 0.5 - kl_coef * sum_rows(gap, mask.offsets)
    return HostResult(
        columns=Batch({"advantages": Column(advantage.astype(np.float32).repeat(mask.lengths), mask.offsets)}),
        metrics={"win_rate": Mean(float(win.sum()), batch.num_rows)},
    )


@recipe
def nash_md(
    prompts: Prompts, actor: Actor, opponent: Opponent, reference: Reference, reward: Reward, cfg: NashMD
) -> None:
    """A game against oneself as one was."""
    theirs = reward.compute_reward(opponent.generate_sequences(prompts))
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = batch.join(theirs, their_rewards="rewards")
    batch = reference.compute_ref_log_prob(actor.compute_log_prob(batch))
    batch = win_advantage(batch, kl_coef=cfg.kl_coef, scale=cfg.scale)
    actor.update_actor(batch, loss=policy_gradient())
    opponent.mix_from(actor, tau=cfg.average)
