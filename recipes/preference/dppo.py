"""DPPO: direct preference-based policy optimisation (An et al. 2023, arXiv 2301.12842), on responses.

    p = s(r(y) - r(y'))                                   a preference predictor, learned from labelled pairs
    L = -p log s(S(y) - S(y')) - (1 - p) log s(S(y') - S(y)),     S(y) = beta mean_t log pi(y_t)

The policy is scored against segments, not rewarded: S is how near it is to one. The predictor labels pairs that nobody
has; both learn in every step. Hard labels and beta of SimPO without its margin are SimPO.
"""

from dataclasses import dataclass

import numpy as np

from recipes.preference._pairs import soft_pairs
from rlhf_dist.algorithms import bradley_terry
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Preferences, RewardModel

PAPERS = {
    "dppo": Paper(
        title="Direct preference-based policy optimisation (DPPO)",
        year=2023,
        arxiv="2301.12842",
        rows=(65,),
        status="outline",
        needs=("PREF", "RMT"),
        assumed="the distance to a response is -mean log pi, its scale beta 2; no smoothness term of the predictor",
    )
}


@dataclass(frozen=True, kw_only=True)
class DPPO:
    """Settings of DPPO."""

    beta: float = 2.0
    """Scale of the mean log-probs."""
    warmup: int = 0
    """Steps in which the predictor alone learns."""


@host_op(reads=("rewards", "label", "group_id"), writes=("win",), scope="groups")
def predicted_wins(batch: Batch) -> HostResult:
    """p of each pair, for both of its rows: the chance that the one labelled +1 is better. `label_agreement`: how often
    the predictor is on the label's side, for pairs that have one."""
    signed, win, right = batch["rewards"].values * batch["label"].values, np.zeros(batch.num_rows, np.float32), 0.0
    groups = batch.group()
    for rows in groups:
        gap = float(signed[rows].sum())
        win[rows] = (1 + np.tanh(gap / 2)) / 2
        right += gap > 0
    metrics = {"label_agreement": Mean(right, float(len(groups)))} if groups else {}
    return HostResult(columns=Batch({"win": Column(win)}, batch.num_rows), metrics=metrics)


@recipe
def dppo(labelled: Preferences, unlabelled: Preferences, actor: Actor, reward: RewardModel, cfg: DPPO) -> None:
    """A predictor of preferences, and a policy on what it says; of `unlabelled` the labels are not used."""
    reward.update_reward_model(labelled, loss=bradley_terry())
    pairs = predicted_wins(reward.compute_reward(unlabelled))
    actor.update_actor(pairs, loss=soft_pairs(cfg.beta, kind="mean"), after=cfg.warmup)
