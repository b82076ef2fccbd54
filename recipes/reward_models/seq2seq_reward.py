"""Sequence-to-sequence reward modelling (Zhou et al. 2024, arXiv 2409.00162): feedback in words, not a number.

    L = -sum_t log p(w_t | x, l, w_<t)       the model reads the prompt and the worse response, and writes the better

What it would leave as it is it finds likely: dense_rewards/seq2seq gives a policy the likelihood of each of its own
tokens after (x, y).
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import nll
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import LanguageModel, Preferences

PAPERS = {
    "seq2seq_reward": Paper(
        title="Sequence-to-sequence reward modelling",
        year=2024,
        arxiv="2409.00162",
        rows=(110,),
        status="outline",
        needs=("RMT", "TOK", "ROLL", "CRIT"),
        assumed="no text between the prompt and the worse response; the policy's token reward (dense_rewards/seq2seq) "
        "is the log-likelihood of its tokens",
    )
}


@dataclass(frozen=True, kw_only=True)
class Seq2Seq:
    """Settings of sequence-to-sequence reward modelling."""

    mini_batches: int = 1
    """Optimizer steps for each batch of pairs."""


@host_op(reads=("prompt_ids", "response_ids", "label", "group_id"), writes=("prompt_ids",), scope="groups", rows="drop")
def better_after_worse(batch: Batch) -> HostResult:
    """The chosen rows, whose prompt has the rejected response of their pair behind it."""
    keep, prompts = list[int](), []
    for rows in batch.group():
        label = batch["label"].values[rows]
        if (label > 0).any() and (label < 0).any():
            won, lost = int(rows[label > 0][0]), int(rows[label < 0][0])
            keep.append(won)
            prompts.append(np.concatenate([batch["prompt_ids"].row(won), batch["response_ids"].row(lost)]))
    order = np.argsort(np.array(keep, np.int64), kind="stable")
    column = Column.ragged([prompts[at] for at in order], dtype="int32")
    return HostResult(columns=Batch({"prompt_ids": column}, len(keep)), keep=np.array(keep, np.int64)[order])


@recipe
def seq2seq_reward(pairs: Preferences, rewriter: LanguageModel, cfg: Seq2Seq) -> None:
    """A model that writes the better response after the worse one."""
    rewriter.update(better_after_worse(pairs), loss=nll(), mini_batches=cfg.mini_batches)
