"""RRM: robust reward models by augmented pairs (Liu et al. 2024, arXiv 2409.13156).

What does not depend on the prompt must tell nothing. For a pair (x_i, w_i, l_i) and the pair j of another prompt:

    away      (x_i: w_i > w_j), (x_i: w_i > l_j)           a response to another prompt is worse, whatever it looks like
    neutral   (x_i: w_j ~ l_j)                             two responses to another prompt are equally bad: label 1/2

L = -p log s(d) - (1 - p) log s(-d),  p = 1 for pairs with an order, 1/2 for neutral ones. All kinds are in one batch.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected, log_sigmoid
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Preferences, RewardModel

PAPERS = {
    "robust": Paper(
        title="RRM: robust reward model",
        year=2024,
        arxiv="2409.13156",
        rows=(108,),
        needs=("RMT", "FILT", "PREF"),
        assumed="one other pair of the batch for each, one pair of each kind; a scalar model, not a pairwise one",
    )
}
KINDS = 4
"""Pairs made of one: itself, two away, one neutral."""


@dataclass(frozen=True, kw_only=True)
class Robust:
    """Settings of robust reward modelling."""

    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


@host_op(
    reads=("response_ids", "response_mask", "label", "group_id"),
    writes=("response_ids", "response_mask", "label", "group_id", "tie"),
    rows="derive",
    scope="batch",
    copies=KINDS,
)
def augmented(batch: Batch) -> HostResult:
    """Four pairs of each: as it is, its chosen response against both of the next pair's, and these two as a tie.

    New groups have negative ids, which no source gives.
    """
    label = batch["label"].values
    pairs = [(rows[label[rows] > 0][0], rows[label[rows] < 0][0]) for rows in batch.group()]
    parents, taken, labels, groups, ties = [], [], [], [], []
    for at, (won, lost) in enumerate(pairs):
        other_won, other_lost = pairs[(at + 1) % len(pairs)]
        made = [(won, lost, 0), (won, other_won, 0), (won, other_lost, 0), (other_won, other_lost, 1)]
        for kind, (better, worse, tie) in enumerate(made if len(pairs) > 1 else made[:1]):
            parents += [won, won]
            taken += [better, worse]
            labels += [1, -1]
            groups += [int(batch["group_id"].values[won]) if kind == 0 else -(KINDS * at + kind)] * 2
            ties += [tie, tie]
    rows = np.array(taken, np.int64)
    columns = {
        "response_ids": batch["response_ids"].take(rows),
        "response_mask": batch["response_mask"].take(rows),
        "label": Column(np.array(labels, np.int8)),
        "group_id": Column(np.array(groups, np.int64)),
        "tie": Column(np.array(ties, np.float32)),
    }
    return HostResult(columns=Batch(columns, len(rows)), parent=np.array(parents, np.int64))


@loss(reads=("label", "tie"), outputs=("scores",), average="groups")
def pair_or_tie(model, rows):
    """Bradley-Terry, with a label of 1/2 where a pair is a tie."""
    won, lost = chosen_and_rejected(model.scores, rows)
    gap, (tie, _) = won - lost, chosen_and_rejected(rows["tie"], rows)
    right = 1 - tie / 2
    value = -right * log_sigmoid(gap) - (1 - right) * log_sigmoid(-gap)
    return value, {"preference_loss": value.detach(), "margin": gap.detach(), "tie": tie}


@recipe
def robust(pairs: Preferences, reward: RewardModel, cfg: Robust) -> None:
    """A reward model on pairs and what is made of them."""
    reward.update_reward_model(augmented(pairs), loss=pair_or_tie(), mini_batches=cfg.mini_batches)
