"""Active DPO by D-optimal design (Kveton et al. 2025, arXiv 2503.01076): the pairs that tell most are learned from.

    greedily, the pair that maximises log det(V + f f'),  f = phi(x, y_1) - phi(x, y_2),  phi a response's last state

Of a step's pairs `share` is kept; labels are needed of these alone. log det grows by log(1 + f' V^-1 f), so each
choice is the pair about which those before it say least.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import dpo
from rlhf_dist.algorithms.ragged import last_counted
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Preferences, Reference

PAPERS = {
    "active_pairs": Paper(
        title="Active learning for DPO by D-optimal design",
        year=2025,
        arxiv="2503.01076",
        rows=(76,),
        status="outline",
        needs=("SAMP", "HID", "PREF", "REF"),
        assumed="the share 0.5 and the ridge 1; features are not weighed by p (1 - p) of the policy's own preference",
    )
}


@dataclass(frozen=True, kw_only=True)
class ActivePairs:
    """Settings of active DPO."""

    beta: float = 0.1
    """Strength of the pull towards the reference."""
    share: float = 0.5
    """Of a step's pairs, those that are learned from."""
    ridge: float = 1.0
    """V at the start is this times the identity."""


@host_op(reads=("hidden", "response_mask", "label", "group_id"), rows="drop", scope="batch")
def most_informative(batch: Batch, *, share: float, ridge: float) -> HostResult:
    """The pairs of a greedy D-optimal design."""
    mask = batch["response_mask"]
    at = last_counted(mask.offsets, mask.values).clip(min=0)
    signed = batch["hidden"].values[at].astype(np.float64) * batch["label"].values[:, None]
    groups = batch.group()
    features = np.array([signed[rows].sum(0) for rows in groups]).reshape(len(groups), -1)
    inverse, left, chosen, gain = np.eye(features.shape[1]) / ridge, list(range(len(groups))), [], 0.0
    for _ in range(min(len(groups), max(1, round(share * len(groups))))):
        told = np.einsum("gd,de,ge->g", features[left], inverse, features[left])
        best = left.pop(int(told.argmax()))
        gain += float(np.log1p(told.max()))
        moved = inverse @ features[best]
        inverse -= np.outer(moved, moved) / (1 + features[best] @ moved)
        chosen.append(best)
    keep = np.sort(np.concatenate([groups[one] for one in chosen])) if chosen else np.empty(0, np.int64)
    return HostResult(columns=Batch({}, len(keep)), keep=keep, metrics={"log_det_gain": Mean(gain)})


@recipe
def active_pairs(pairs: Preferences, actor: Actor, reference: Reference, cfg: ActivePairs) -> None:
    """DPO on a chosen part of the pairs."""
    pairs = most_informative(actor.compute_hidden(pairs), share=cfg.share, ridge=cfg.ridge)
    actor.update_actor(reference.compute_ref_log_prob(pairs), loss=dpo(cfg.beta))
