"""Pairwise-RL (Xu et al. 2025, arXiv 2504.04950): the reward is the chance to beat an anchor, in both orders.

    r(y) = P(y > y_anchor) = (P("1" | y, y_anchor) + 1 - P("1" | y_anchor, y)) / 2           PPO on r

A generative judge compares, so that it is asked the same question in its training and here. The anchor of a prompt is
one greedy response of the reference. Responses without a verdict in both orders are left out, and counted.
"""

from dataclasses import dataclass

import numpy as np

from recipes.policy_gradient._critic import WithCritic, learn_with_critic
from recipes.policy_gradient.judge_grpo import PAIRWISE
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.parsers import Choice
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Critic, Judge, Prompts, Reference
from rlhf_dist.transforms import verdict_means

PAPERS = {
    "anchored_judge": Paper(
        title="Pairwise-RL",
        year=2025,
        arxiv="2504.04950",
        rows=(42,),
        status="outline",
        needs=("PAIRJ", "JUDGE", "ROLL", "CRIT", "RMT"),
        assumed="the anchor is the reference's greedy response; the judge is given, trained by sft; PPO's KL",
    )
}


@dataclass(frozen=True, kw_only=True)
class AnchoredJudge(WithCritic):
    """Settings of PPO against an anchor."""

    votes: int = 1
    """Verdicts on each response in each order."""
    question: str = PAIRWISE
    """What the judge is asked about {prompt}, {response_a} and {response_b}."""
    marker: str = "Score:"
    """What stands before 1, 2 or tie in its answer."""


@host_op(reads=("first", "second"), writes=("rewards",))
def chance_to_win(batch: Batch) -> HostResult:
    """(first + 1 - second) / 2 of the mean verdicts where a row stood first and where it stood second."""
    first, second = batch["first"].values, batch["second"].values
    rewards = ((first + 1 - second) / 2).astype(np.float32)
    agree = np.sign(first - 0.5) == np.sign(0.5 - second)
    metrics = {"order_agreement": Mean(float(agree.sum()), float(len(agree)))} if len(agree) else {}
    return HostResult(columns=Batch({"rewards": Column(rewards)}, batch.num_rows), metrics=metrics)


def against(batch, judge, anchor: str, question: str, marker: str, votes: int = 1):
    """A part of a recipe: the rows that have a verdict in both orders, with their chance to beat the text in column
    `anchor` as their reward."""
    parser = Choice({"1": 1.0, "2": 0.0, "tie": 0.5}, after=marker)
    for place, (one, other) in {"first": ("response", anchor), "second": (anchor, "response")}.items():
        asked = batch.with_columns_of(batch, response_a=one, response_b=other)
        verdicts = judge.generate_sequences(asked, template=Template(question), parser=parser, n=votes)
        batch, _ = verdict_means(batch, verdicts, column="choice", into=place).where("judged")
    return chance_to_win(batch)


@recipe
def anchored_judge(
    prompts: Prompts, actor: Actor, critic: Critic, reference: Reference, judge: Judge, cfg: AnchoredJudge
) -> None:
    """PPO on the chance to beat what the reference says."""
    anchors = reference.generate_sequences(prompts, greedy=True)
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt).join(anchors, on="group", anchor="response")
    batch = against(batch, judge, "anchor", cfg.question, cfg.marker, cfg.votes)
    learn_with_critic(batch, actor, critic, reference, cfg)
