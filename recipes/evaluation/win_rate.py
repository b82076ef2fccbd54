"""How often a judge finds a policy's response better than a baseline's (AlpacaFarm, Dubois et al. 2023, 2305.14387).

    win rate = mean over prompts of P(y is better than y'),  y ~ policy,  y' ~ baseline: both orders, a tie is a half

`unjudged` prompts, in which one of the orders has no verdict, are in no mean; `order_agreement` and `first_wins` say
how far the judge looks at the order alone.
"""

from dataclasses import dataclass

import numpy as np

from recipes.online_preference._compared import compared
from recipes.policy_gradient.judge_grpo import PAIRWISE
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.missing import is_missing
from rlhf_dist.roles import Judge, Opponent, Prompts
from rlhf_dist.transforms import mark_rows

PAPERS = {
    "win_rate": Paper(
        title="Win rate by a judge",
        year=2023,
        arxiv="2305.14387",
        status="study",
        needs=("EVAL", "JUDGE", "ROLL"),
        assumed="the baseline's responses are drawn, too; no correction for length",
    )
}


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """Settings of the measurement."""

    question: str = PAIRWISE
    """What the judge is asked about {prompt}, {response_a} and {response_b}."""
    marker: str = "Score:"
    """What stands before the verdict: 1, 2 or tie."""
    votes: int = 1
    """Answers to each question."""


@host_op(reads=("rewards", "ours", "response_mask"), missing=True)
def measured(batch: Batch) -> HostResult:
    """The policy's win rate and both mean lengths; `ours` is 1 for its rows, 0 for the baseline's."""
    ours = batch["ours"].values > 0
    won = batch["rewards"].values[ours]
    known = ~is_missing(won)
    lengths = batch["response_mask"].lengths
    metrics = {
        "unjudged": Mean(float((~known).sum()), float(max(len(won), 1))),
        "our_tokens": Mean(float(lengths[ours].sum()), float(max(ours.sum(), 1))),
        "their_tokens": Mean(float(lengths[~ours].sum()), float(max((~ours).sum(), 1))),
    }
    if known.any():
        metrics["win_rate"] = Mean(float(won[known].sum(dtype=np.float64)), float(known.sum()))
    return HostResult(columns=Batch({}, batch.num_rows), metrics=metrics)


@recipe
def win_rate(prompts: Prompts, policy: Opponent, baseline: Opponent, judge: Judge, cfg: WinRate) -> None:
    """A policy against a baseline, as a judge sees them."""
    batch = mark_rows(policy.generate_sequences(prompts), column="ours", number=1)
    batch = batch.concat(mark_rows(baseline.generate_sequences(prompts), column="ours", number=0))
    measured(compared(batch, judge, cfg.question, cfg.marker, votes=cfg.votes))
