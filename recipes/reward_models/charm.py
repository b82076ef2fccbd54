"""ChARM: reward modelling for role play (Fang et al. 2025, arXiv 2505.23923): margins that follow the act.

    L = -log sigma(r(w) - r(l) - m)            m = c * the pair's own margin: how clear the act makes it
    self-evolution: of unlabelled pairs those with |r(1) - r(2)| > t are labelled by the model itself, and learned too

DPO on the model's scores is iterative_dpo. Rows of `unlabelled` are pairs whose labels say which row is which, and are
not looked at.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import bradley_terry, loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected, log_sigmoid
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Preferences, RewardModel

PAPERS = {
    "charm": Paper(
        title="ChARM: act-adaptive margins and self-evolution",
        year=2025,
        arxiv="2505.23923",
        rows=(119,),
        status="outline",
        needs=("RMT", "FILT", "PREF", "JUDGE"),
        assumed="the margin of an act is the data's, times 1; sure is a gap of 1; self-labelled pairs have weight 0.5 "
        "and no margin; the first labels are given",
    )
}


@dataclass(frozen=True, kw_only=True)
class ChARM:
    """Settings of reward modelling with self-evolution."""

    margin_coef: float = 1.0
    """c."""
    sure: float = 1.0
    """t: a gap of rewards above which the model labels a pair."""
    own_coef: float = 0.5
    """Weight of the pairs that it has labelled."""


@loss(reads=("label", "margin"), outputs=("scores",), average="groups")
def adaptive_margin(model, rows, coef: float = 1.0):
    """-log sigma(r_w - r_l - coef m)."""
    won, lost = chosen_and_rejected(model.scores, rows)
    margin, _ = chosen_and_rejected(rows["margin"], rows)
    value = -log_sigmoid(won - lost - coef * margin)
    return value, {"accuracy": (won > lost).to(value.dtype), "margin": (won - lost).detach()}


@host_op(reads=("rewards", "group_id"), writes=("label",), scope="groups", rows="drop")
def own_labels(batch: Batch, *, sure: float) -> HostResult:
    """Pairs whose rewards are far enough apart, labelled by them."""
    label, groups = np.zeros(batch.num_rows, np.int8), batch.group()
    for rows in groups:
        rewards = batch["rewards"].values[rows]
        if len(rows) == 2 and abs(float(rewards[0] - rewards[1])) > sure:
            label[rows] = np.where(rewards == rewards.max(), 1, -1)
    keep = np.flatnonzero(label)
    metrics = {"sure_pairs": Mean(len(keep) / 2, float(len(groups)))}
    return HostResult(columns=Batch({"label": Column(label[keep])}, len(keep)), keep=keep, metrics=metrics)


@recipe
def charm(pairs: Preferences, unlabelled: Preferences, reward: RewardModel, cfg: ChARM) -> None:
    """Labelled pairs with their margins, and pairs that the model is sure of."""
    own = own_labels(reward.compute_reward(unlabelled), sure=cfg.sure)
    reward.update_reward_model([(pairs, adaptive_margin(cfg.margin_coef)), (own, bradley_terry(), cfg.own_coef)])
