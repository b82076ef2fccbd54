"""Pairs cleaned by a vote of reward models (Secrets of RLHF II, Wang et al. 2024, arXiv 2401.06080).

mu, sigma: mean and standard deviation over K models of r_k(w) - r_k(l), the strength of a preference

flip       pairs with mu < 0 have their label turned
soft       -p log s(d) - (1 - p) log s(-d),   p = s(mu)            d = r(w) - r(l) of the model that learns
margin     -log s(d - mu)                                          an adaptive margin
(MetaRM and the contrastive term of the paper are not here.)
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected, log_sigmoid
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Preferences, RewardModel

SECRETS = {"rows": (100,), "year": 2024, "arxiv": "2401.06080", "status": "outline"}
NEEDS = ("RMT", "MRM", "FILT", "AUX", "BRANCH")
ASSUMED = "three models; no MetaRM and no contrastive term"
PAPERS = {
    "denoised": Paper(title="Secrets of RLHF II: adaptive margin", **SECRETS, needs=NEEDS, assumed=ASSUMED),
    "soft": Paper(
        title="Secrets of RLHF II: soft labels",
        **SECRETS,
        needs=NEEDS,
        settings={"algorithm.kind": "soft"},
        assumed=ASSUMED,
    ),
    "flip": Paper(
        title="Secrets of RLHF II: flipped labels",
        **SECRETS,
        needs=NEEDS,
        settings={"algorithm.kind": "flip"},
        assumed=ASSUMED,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """Settings of reward modelling on cleaned pairs."""

    kind: Literal["margin", "soft", "flip"] = "margin"
    """What is done with the strength of a preference."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


@host_op(reads=("vote_1", "vote_2", "vote_3", "label", "group_id"), writes=("strength",), scope="groups")
def strengths(batch: Batch) -> HostResult:
    """mu, the same for both rows of a pair."""
    votes = np.stack([batch[f"vote_{k}"].values for k in (1, 2, 3)]) * batch["label"].values
    strength, doubt = np.zeros(batch.num_rows, np.float32), 0.0
    groups = batch.group()
    for rows in groups:
        gaps = votes[:, rows].sum(1)
        strength[rows] = gaps.mean()
        doubt += float(gaps.std())
    pairs = float(len(groups))
    metrics = {"strength": Mean(float(strength.sum()) / 2, pairs), "strength_deviation": Mean(doubt, pairs)}
    return HostResult(columns=Batch({"strength": Column(strength)}), metrics=metrics)


@loss(reads=("label", "strength"), outputs=("scores",), average="groups")
def strength_loss(model, rows, kind: Literal["margin", "soft", "flip"] = "margin"):
    """A loss of the module's table, averaged over pairs."""
    won, lost = chosen_and_rejected(model.scores, rows)
    gap, (mu, _) = won - lost, chosen_and_rejected(rows["strength"], rows)
    if kind == "margin":
        value = -log_sigmoid(gap - mu)
    elif kind == "soft":
        value = -mu.sigmoid() * log_sigmoid(gap) - (-mu).sigmoid() * log_sigmoid(-gap)
    else:
        value = -log_sigmoid(gap.where(mu >= 0, -gap))
    return value, {"accuracy": (gap > 0).to(gap.dtype), "margin": gap.detach(), "flipped": (mu < 0).to(gap.dtype)}


@recipe
def denoised(
    pairs: Preferences, reward: RewardModel, first: RewardModel, second: RewardModel, third: RewardModel, cfg: Denoised
) -> None:
    """A reward model on pairs whose strength others have voted on."""
    for number, voter in enumerate((first, second, third), start=1):
        pairs = voter.compute_reward(pairs, out=f"vote_{number}")
    pairs = strengths(pairs)
    reward.update_reward_model(pairs, loss=strength_loss(cfg.kind), mini_batches=cfg.mini_batches)
