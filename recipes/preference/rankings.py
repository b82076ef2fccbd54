"""Learning from ranked lists (PRO, Song et al. 2023, arXiv 2306.17492): several scored responses to each prompt.

    L = -sum_k log exp(s_k) / sum_{i >= k} exp(s_i) + c NLL(best),   s the mean log-prob, y_1 the best

Where DPO has one comparison, a list has one for each place. Rows of the file: prompt, response and `score`; those of
one prompt are a list, stand together, and come in one step. The other losses on lists: `_lists.py`.
"""

from dataclasses import dataclass

import numpy as np

from recipes.preference._lists import WITH_REFERENCE, ListKind, list_loss
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Examples, Reference

PAPERS = {
    "rankings": Paper(
        title="Preference ranking optimisation (PRO)",
        year=2023,
        arxiv="2306.17492",
        rows=(51,),
        needs=("PREF", "AUX"),
        assumed="the weight 0.05 of the likelihood; no temperature by reward gaps",
    ),
    "lipo": Paper(
        title="LiPO-lambda",
        year=2024,
        arxiv="2402.01878",
        rows=(52,),
        needs=("PREF", "REF"),
        settings={"algorithm.kind": "lipo", "algorithm.beta": 0.05},
        assumed="beta",
    ),
    "plackett_luce": Paper(
        title="DPO under a Plackett-Luce model",
        year=2023,
        arxiv="2305.18290",
        needs=("PREF", "REF"),
        settings={"algorithm.kind": "plackett_luce"},
    ),
    "rrhf": Paper(
        title="RRHF", year=2023, arxiv="2304.05302", needs=("PREF", "AUX"), settings={"algorithm.kind": "rrhf"}
    ),
}


@dataclass(frozen=True, kw_only=True)
class Rankings:
    """Settings of losses on lists."""

    kind: ListKind = "pro"
    """The loss on a list."""
    beta: float = 0.1
    """Scale of log-ratios, where the loss has them."""
    nll_coef: float = 0.05
    """Weight of the best response's likelihood in pro."""
    temperature: float = 1.0
    """Of the rewards in exo."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


class Scored(Examples):
    """Responses with a score each."""

    fields = {"score": "float32"}


@host_op(reads=("prompt", "score", "group_id"), writes=("group_id", "rewards"), scope="batch")
def lists_of_prompts(batch: Batch) -> Batch:
    """Rows of one prompt as one group, that of the first."""
    first: dict[str, int] = {}
    groups = batch["group_id"].values
    ids = [first.setdefault(prompt, int(groups[row])) for row, prompt in enumerate(batch["prompt"].rows())]
    rewards = batch["score"].values.astype(np.float32)
    return Batch({"group_id": Column(np.array(ids, np.int64)), "rewards": Column(rewards)}, batch.num_rows)


@recipe
def rankings(examples: Scored, actor: Actor, reference: Reference, cfg: Rankings) -> None:
    """PRO, or another loss, on given lists."""
    lists = lists_of_prompts(examples)
    if cfg.kind in WITH_REFERENCE:
        lists = reference.compute_ref_log_prob(lists)
    if cfg.kind == "brain":
        lists = actor.compute_log_prob(lists)
    loss = list_loss(cfg.kind, cfg.beta, nll_coef=cfg.nll_coef, temperature=cfg.temperature)
    actor.update_actor(lists, loss=loss, mini_batches=cfg.mini_batches)
