"""SMART (Liu et al. 2024, arXiv 2410.16128): the policy learns which strategy to choose at its first attempt.

    first    y ~ pi(. | x): the policy chooses a strategy, and answers by it
    retries  where that is wrong, every strategy's words are put before the answer, which the policy goes on with
    L        -log pi(strategy, answer | x) on first attempts that were right, and on retries that were, as first ones

No reward enters the gradient: a strategy that works more often is chosen more often.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import nll
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Prompts, Reward

PAPERS = {
    "smart": Paper(
        title="SMART: self-learning meta-strategy agent",
        year=2024,
        arxiv="2410.16128",
        rows=(166,),
        status="outline",
        needs=("ROLL", "VER", "SFT", "FILT", "BRANCH"),
        assumed="the strategies' words; all of them are tried where the first attempt was wrong",
    )
}


@dataclass(frozen=True, kw_only=True)
class Smart:
    """Settings of SMART."""

    strategies: tuple[str, ...] = ("Step by step: ", "As a program: ", "By asking smaller questions: ")
    """How an answer may begin."""
    samples_per_prompt: int = 1
    """First attempts at each prompt."""
    right: float = 1.0
    """A reward from which on an answer is right."""


@host_op(reads=("rewards",), writes=("solved",))
def solved(batch: Batch, *, right: float) -> HostResult:
    """1 where the answer is right."""
    found = (batch["rewards"].values >= right).astype(np.float32)
    share = Mean(float(found.sum()), float(batch.num_rows))
    return HostResult(columns=Batch({"solved": Column(found)}, batch.num_rows), metrics={"solved": share})


@host_op(reads=("prompt",), writes=("strategy",))
def with_strategy(batch: Batch, *, strategy: str) -> Batch:
    """The words that the answer is to begin with."""
    return Batch({"strategy": Column.strings([strategy] * batch.num_rows)}, batch.num_rows)


@host_op(
    reads=("asked_ids", "prompt_ids", "response_ids"),
    writes=("prompt_ids", "response_ids", "response_mask"),
)
def as_first_attempt(batch: Batch) -> Batch:
    """The beginning that was given becomes a part of the response, which is learned as a whole."""
    prompts, responses = [], []
    for row in range(batch.num_rows):
        asked, given = batch["asked_ids"].row(row), batch["prompt_ids"].row(row)
        prompts.append(asked)
        responses.append(np.concatenate([given[len(asked) :], batch["response_ids"].row(row)]))
    return Batch(
        {
            "prompt_ids": Column.ragged(prompts, np.int32),
            "response_ids": Column.ragged(responses, np.int32),
            "response_mask": Column.ragged([np.ones(len(one)) for one in responses], np.uint8),
        },
        batch.num_rows,
    )


@recipe
def smart(prompts: Prompts, actor: Actor, reward: Reward, cfg: Smart) -> None:
    """Imitation of the strategies that worked."""
    prompts = prompts.with_columns_of(prompts, asked_ids="prompt_ids")
    first = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    right, wrong = solved(first, right=cfg.right).where("solved")
    learned = [right.select("prompt_ids", "response_ids", "response_mask", "group_id")]
    for strategy in cfg.strategies:
        again = actor.generate_sequences(with_strategy(wrong, strategy=strategy), prefix="strategy")
        worked, _ = solved(reward.compute_reward(again), right=cfg.right).where("solved")
        whole = as_first_attempt(worked)
        learned.append(whole.select("prompt_ids", "response_ids", "response_mask", "group_id"))
    actor.update_actor(learned[0].concat(*learned[1:]), loss=nll())
