"""Consistent reward models (Shen et al. 2023, arXiv 2309.16155): similar responses should have similar rewards.

    ConvexDA       -log sigma(r(z_w) - r(z_l)),  z = lambda e_i + (1 - lambda) e_j: embeddings of a pair and of another
    RewardFusion   r(i) = sum_j a_ij r_j,  a_i = softmax of cos(e_i, e_j) / tau over the rows of the batch like i

The score is linear in the last state, so the score of a mixed embedding is the same mixture of scores: the mixture is
made of the four scores of two pairs. Fusion changes no weight; `fuse` reports how often it ranks pairs rightly
(`fused_accuracy`, beside `plain_accuracy`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.losses.pairs import log_sigmoid
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Preferences, RewardModel
from rlhf_dist.transforms.columns import at_last_token

TRICKLE = {"year": 2023, "arxiv": "2309.16155", "rows": (112,), "status": "outline", "needs": ("RMT", "MRM", "EVAL")}
PAPERS = {
    "consistency": Paper(
        title="ConvexDA: mixed embeddings for a consistent reward model",
        **TRICKLE,
        assumed="embeddings of whole responses are mixed, with a pair of the same batch, where the paper mixes those "
        "of words with their synonyms; lambda even in [1/2, 1]",
    ),
    "reward_fusion": Paper(
        title="RewardFusion: rewards of similar examples",
        **TRICKLE,
        settings={"algorithm.fuse": True, "algorithm.least_share": 1.0},
        assumed="similar is a cosine of 0.9 in the same batch, tau 0.1; the benchmark is data",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """Settings of consistent reward modelling."""

    least_share: float = 0.5
    """lambda is drawn between this and 1; 1: pairs as they are."""
    fuse: bool = False
    """Report the accuracy of fused rewards."""
    least_cosine: float = 0.9
    """Rows at least so similar are fused."""
    tau: float = 0.1
    """Temperature of their shares."""
    mini_batches: int = 1
    """Optimizer steps for each batch of pairs."""


@host_op(reads=("label", "group_id"), writes=("group_id", "share"), scope="batch", rows="derive", copies=2)
def with_partners(batch: Batch, *, least_share: float, rng: np.random.Generator) -> HostResult:
    """Each pair with the next one as its partner, a group of four rows: shares lambda and 1 - lambda."""
    pairs = batch.group()
    parents, groups, shares = list[int](), list[int](), list[float]()
    for at, rows in enumerate(pairs):
        share = float(rng.uniform(least_share, 1.0)) if len(pairs) > 1 else 1.0
        partner = pairs[(at + 1) % len(pairs)]
        mixed = [(rows, share), (partner, 1 - share)] if share < 1 else [(rows, 1.0)]
        for taken, part in mixed:
            parents += [int(row) for row in taken]
            shares += [part] * len(taken)
            groups += [int(batch["group_id"].values[rows[0]])] * len(taken)
    columns = {"group_id": Column(np.array(groups, np.int64)), "share": Column(np.array(shares, np.float32))}
    return HostResult(columns=Batch(columns, len(parents)), parent=np.array(parents, np.int64))


@loss(reads=("label", "share"), outputs=("scores",), average="groups")
def mixed_preference(model, rows):
    """Bradley-Terry on the mixed scores; with shares of 1 it is the plain one."""
    gap = rows.sum_groups(rows["share"] * rows["label"] * model.scores)
    return -log_sigmoid(gap), {"accuracy": (gap > 0).to(gap.dtype), "margin": gap.detach()}


@host_op(reads=("rewards", "hidden", "label", "group_id"), scope="batch")
def fusion(batch: Batch, *, least_cosine: float, tau: float) -> HostResult:
    """How often pairs are ranked rightly by rewards as they are, and fused over similar rows."""
    rewards = batch["rewards"].values.astype(np.float64)
    fused = shares_of_similar(last_directions(batch), least_cosine, tau) @ rewards
    groups, label, metrics = batch.group(), batch["label"].values, {}
    for name, found in (("plain", rewards), ("fused", fused)):
        right = sum(float((found[rows] * label[rows]).sum() > 0) for rows in groups)
        metrics[f"{name}_accuracy"] = Mean(right, float(len(groups)))
    return HostResult(columns=Batch({}, batch.num_rows), metrics=metrics)


def last_directions(batch: Batch) -> np.ndarray[Any, Any]:
    """[B, H] the state at each row's last token, of length 1; 0 for a row without tokens."""
    states = at_last_token(batch, "hidden")
    return states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-12)


def shares_of_similar(states: np.ndarray[Any, Any], least_cosine: float, tau: float) -> np.ndarray[Any, Any]:
    """[B, B], each row adds up to 1; what is less similar than that has no share, a row itself always has one."""
    cosine = states @ states.T
    similar = (cosine >= least_cosine) | np.eye(len(states), dtype=bool)
    weight = np.where(similar, np.exp((cosine - 1) / tau), 0.0)
    return weight / weight.sum(1, keepdims=True)


@recipe
def consistency(pairs: Preferences, reward: RewardModel, cfg: Consistency) -> None:
    """A reward model on mixed pairs, and what fusion would make of its rewards."""
    if cfg.fuse:
        fusion(reward.compute_hidden(reward.compute_reward(pairs)), least_cosine=cfg.least_cosine, tau=cfg.tau)
    mixed = with_partners(pairs, least_share=cfg.least_share)
    reward.update_reward_model(mixed, loss=mixed_preference(), mini_batches=cfg.mini_batches)
