"""Nash learning from human feedback (Munos et al. 2023, arXiv 2312.00886): a game against a tamer self.

    advantage(y) = P(y > y') - 1/2 - tau log pi(y) / pi_ref(y)          y ~ pi, y' ~ the opponent

    mixture   pi(y_t)^(1 - beta) pi_ref(y_t)^beta, drawn token by token: Nash-MD-PG
    average   the exponential moving average of the policy's weights: Nash-EMA-PG

P is a sigmoid of the difference of rewards.
"""

from dataclasses import dataclass
from typing import Literal

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
        title="Nash-MD",
        year=2023,
        arxiv="2312.00886",
        rows=(93,),
        needs=("ROLL", "PAIRJ", "REF", "SNAP"),
        assumed="P is a sigmoid of the difference of rewards",
    ),
    "average": Paper(
        title="Nash-EMA",
        year=2023,
        arxiv="2312.00886",
        rows=(93,),
        needs=("ROLL", "PAIRJ", "REF", "SNAP"),
        settings={"algorithm.opponent": "average"},
        assumed="P is a sigmoid of the difference of rewards",
    ),
}


@dataclass(frozen=True, kw_only=True)
class NashMD:
    """Settings of Nash-MD-PG."""

    samples_per_prompt: int = 1
    """Responses to each prompt."""
    opponent: Literal["mixture", "average"] = "mixture"
    """Who the other response is of."""
    mixture: float = 0.125
    """beta, the reference's share in the mixture (the paper's best, of 0.125 to 1)."""
    kl_coef: float = 0.02
    """tau, the price of the log-ratio to the reference."""
    average: float = 0.01
    """Share of the policy in an average opponent's weights, a step."""
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
    """A game against oneself, closer to the reference or as one was."""
    mixed = cfg.opponent == "mixture"
    if mixed:
        theirs = actor.generate_sequences(prompts, mixture=(reference, cfg.mixture))
    else:
        theirs = opponent.generate_sequences(prompts)
    theirs = reward.compute_reward(theirs)
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    batch = batch.join(theirs, their_rewards="rewards")
    batch = reference.compute_ref_log_prob(actor.compute_log_prob(batch))
    batch = win_advantage(batch, kl_coef=cfg.kl_coef, scale=cfg.scale)
    actor.update_actor(batch, loss=policy_gradient())
    if not mixed:
        opponent.mix_from(actor, tau=cfg.average)
