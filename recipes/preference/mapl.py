"""Multi-level aware preference learning (MAPL, Sun et al. 2025, arXiv 2505.12845): pairs of responses, prompts, pairs.

    plain          y_w > y_l under x
    intra-sample   x > x' for y_w: the response belongs to its own prompt             x' the prompt of another pair
    inter-sample   -log s(m_a - m_b): of two pairs the one with the larger given margin is further apart

with m = beta (h(w) - h(l)) of a policy (h = log pi/pi_ref, DPO) or m = r(w) - r(l) of a reward model. Pairs whose
margins are equal or unknown have no order, and no third term.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_dist.algorithms import bradley_terry, dpo, loss
from rlhf_dist.algorithms.losses.pairs import log_sigmoid
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Preferences, Reference, RewardModel

NEEDS = ("PREF", "RMT", "AUX")
ASSUMED = "weights 1 of both levels; another prompt is that of the step's next pair, not the same one with less asked"
PAPERS = {
    "mapl": Paper(
        title="MAPL, a policy (DPO)",
        year=2025,
        arxiv="2505.12845",
        rows=(58,),
        status="outline",
        needs=NEEDS,
        assumed=ASSUMED,
    ),
    "reward": Paper(
        title="MAPL, a reward model",
        year=2025,
        arxiv="2505.12845",
        rows=(58,),
        status="outline",
        needs=NEEDS,
        settings={"algorithm.learner": "reward"},
        assumed=ASSUMED,
    ),
}


@dataclass(frozen=True, kw_only=True)
class MAPL:
    """Settings of multi-level preference learning."""

    learner: Literal["policy", "reward"] = "policy"
    """What learns: a policy by DPO, or a reward model."""
    beta: float = 0.1
    """DPO's strength of the pull towards the reference."""
    intra_coef: float = 1.0
    """Weight of pairs of prompts."""
    inter_coef: float = 1.0
    """Weight of pairs of pairs."""


@host_op(
    reads=("prompt_ids", "label", "group_id"),
    writes=("prompt_ids", "label"),
    rows="derive",
    scope="batch",
    copies=2,
)
def prompt_pairs(batch: Batch) -> HostResult:
    """Of each chosen response a pair: +1 under its own prompt, -1 under that of the next pair. A step of one pair has
    none."""
    won = [rows[batch["label"].values[rows] > 0][0] for rows in batch.group()]
    parents, prompts = list[int](), list[np.ndarray]()
    for at, row in enumerate(won if len(won) > 1 else []):
        parents += [int(row)] * 2
        prompts += [batch["prompt_ids"].row(int(one)) for one in (row, won[(at + 1) % len(won)])]
    label = np.tile(np.array([1, -1], np.int8), len(parents) // 2)
    columns = {"prompt_ids": Column.ragged(prompts, dtype="int32"), "label": Column(label)}
    return HostResult(columns=Batch(columns, len(parents)), parent=np.array(parents, np.int64))


@host_op(reads=("margin", "label", "group_id"), writes=("group_id", "sign"), rows="drop", scope="batch")
def pairs_of_pairs(batch: Batch) -> HostResult:
    """Pairs two by two, in their order, as groups of four rows whose margins differ: sign is the label in the pair with
    the larger margin, and the label turned in the other. A last one alone, and two with one margin, are left out."""
    margin, label, group = batch["margin"].values, batch["label"].values, batch["group_id"].values
    groups, keep, sign, ids, equal = batch.group(), list[int](), list[float](), list[int](), 0
    for one, other in zip(groups[::2], groups[1::2], strict=False):
        larger, smaller = (one, other) if margin[one[0]] > margin[other[0]] else (other, one)
        if margin[one[0]] == margin[other[0]]:
            equal += 1
            continue
        for rows, way in ((larger, 1), (smaller, -1)):
            keep += rows.tolist()
            sign += (way * label[rows]).tolist()
            ids += [int(group[one[0]])] * len(rows)
    order = np.argsort(keep, kind="stable")
    columns = {"sign": Column(np.array(sign, np.float32)[order]), "group_id": Column(np.array(ids, np.int64)[order])}
    metrics = {"pairs_of_pairs": Mean(len(keep) / 4, 0), "equal_margins": Mean(float(equal), 0)}
    return HostResult(columns=Batch(columns, len(keep)), keep=np.array(keep, np.int64)[order], metrics=metrics)


@loss(
    reads=lambda settings: ("sign", *(() if settings["scores"] else ("ref_log_probs",))),
    outputs=lambda settings: ("scores",) if settings["scores"] else ("log_probs",),
    average="groups",
)
def further_apart(model, rows, beta: float = 0.1, *, scores: bool = False):
    """-log s(m_a - m_b) of four rows, whose signed sum is the difference of both margins. scores: of a reward model."""
    per_row = model.scores if scores else beta * rows.sum_tokens(model.log_probs - rows["ref_log_probs"])
    gap = rows.sum_groups(rows["sign"] * per_row)
    return -log_sigmoid(gap), {"margins_in_order": (gap > 0).to(gap.dtype)}


@recipe
def mapl(pairs: Preferences, actor: Actor, reference: Reference, reward: RewardModel, cfg: MAPL) -> None:
    """Three levels in one step."""
    prompts = prompt_pairs(pairs)
    if cfg.learner == "reward":
        plain = bradley_terry()
        terms = [(pairs, plain), (prompts, plain, cfg.intra_coef)]
        reward.update_reward_model([*terms, (pairs_of_pairs(pairs), further_apart(scores=True), cfg.inter_coef)])
        return
    pairs, prompts = reference.compute_ref_log_prob(pairs), reference.compute_ref_log_prob(prompts)
    terms = [(pairs, dpo(cfg.beta)), (prompts, dpo(cfg.beta), cfg.intra_coef)]
    actor.update_actor([*terms, (pairs_of_pairs(pairs), further_apart(cfg.beta), cfg.inter_coef)])
