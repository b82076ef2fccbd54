"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306): responses that are good or bad, unpaired.

    r(x, y) = log pi(y|x) - log pi_ref(y|x)          z = max(0, mean of r(x, y') over mismatched y')
    L = w_good (1 - sigmoid(beta (r - z)))           for a good response
        w_bad  (1 - sigmoid(beta (z - r)))           for a bad one

Under `kind=bco` (Jung et al. 2024, arXiv 2404.04656) a classifier of rewards instead, its zero between the two kinds:

    L = -log sigmoid(beta (r - z)) for a good, -log sigmoid(beta (z - r)) for a bad one
    z = (mean of r over the batch's good responses + mean over its bad ones) / 2

z of KTO stands for KL(pi || pi_ref): every prompt with the response to another, under the policy as it is before the
update. A row of the file has `desirable`: 1 or 0.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.losses.pairs import log_sigmoid
from rlhf_dist.algorithms.ragged import sum_rows
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Examples, Reference

PAPERS = {
    "kto": Paper(title="KTO", year=2024, arxiv="2402.01306", needs=("PREF", "REF")),
    "bco": Paper(
        title="Binary classifier optimisation (BCO)",
        year=2024,
        arxiv="2404.04656",
        needs=("PREF", "REF"),
        settings={"algorithm.kind": "bco"},
        assumed="the shift is of the batch, not a moving average; no density ratio of prompts",
    ),
}


@dataclass(frozen=True, kw_only=True)
class KTO:
    """Settings of KTO."""

    kind: Literal["kto", "bco"] = "kto"
    """The loss on a response."""

    beta: float = 0.1
    """Strength of the pull towards the reference."""
    desirable: float = 1.0
    """Weight of good responses."""
    undesirable: float = 1.0
    """Weight of bad ones."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


class Labelled(Examples):
    """Examples that are good or bad."""

    fields = {"desirable": "float32"}


@host_op(reads=("response_ids",), writes=("response_ids", "response_mask"), rows="derive", scope="batch")
def mismatched(batch: Batch) -> HostResult:
    """Each prompt with the response of the next row."""
    rows = np.arange(batch.num_rows)
    ids = batch["response_ids"].take(np.roll(rows, -1))
    mask = Column(np.ones(len(ids.values), np.uint8), ids.offsets)
    return HostResult(columns=Batch({"response_ids": ids, "response_mask": mask}), parent=rows)


@host_op(reads=(("group_id",), ("old_log_probs", "ref_log_probs")), writes=("kl",), scope="batch")
def kl_of(batch: Batch, others: Batch) -> HostResult:
    """z, the same for every row: the mean log-ratio of `others`, 0 at least."""
    ratio = others["old_log_probs"].values.sum(dtype="float64") - others["ref_log_probs"].values.sum(dtype="float64")
    kl = max(0.0, float(ratio) / max(others.num_rows, 1))
    return HostResult(columns=Batch({"kl": Column(np.full(batch.num_rows, kl, np.float32))}), metrics={"kl": Mean(kl)})


@host_op(reads=("old_log_probs", "ref_log_probs", "response_mask", "desirable"), writes=("kl",), scope="batch")
def reward_shift(batch: Batch) -> HostResult:
    """BCO's z, the same for every row: half way between the mean log-ratios of good rows and of bad ones; that of the
    one kind where the other is missing."""
    mask = batch["response_mask"]
    ratio = sum_rows((batch["old_log_probs"].values - batch["ref_log_probs"].values) * (mask.values > 0), mask.offsets)
    good = batch["desirable"].values > 0
    means = [float(ratio[kind].mean()) for kind in (good, ~good) if kind.any()]
    shift = sum(means) / max(len(means), 1)
    column = Column(np.full(batch.num_rows, shift, np.float32))
    return HostResult(columns=Batch({"kl": column}), metrics={"shift": Mean(shift)})


@loss(reads=("ref_log_probs", "desirable", "kl"), average="rows")
def kto_loss(
    model,
    rows,
    beta: float = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
    kind: Literal["kto", "bco"] = "kto",
):
    """Eq. 8 of the paper, or BCO's; one number a row."""
    ratio = rows.sum_tokens(model.log_probs - rows["ref_log_probs"])
    gain, good = beta * (ratio - rows["kl"]), rows["desirable"] > 0
    if kind == "bco":
        value = (desirable * -log_sigmoid(gain)).where(good, undesirable * -log_sigmoid(-gain))
    else:
        value = (desirable * (1 - gain.sigmoid())).where(good, undesirable * (1 - (-gain).sigmoid()))
    return value, {"log_ratio": ratio.detach(), "desirable": good.float()}


@recipe
def kto(examples: Labelled, actor: Actor, reference: Reference, cfg: KTO) -> None:
    """KTO on labelled responses."""
    examples = reference.compute_ref_log_prob(examples)
    if cfg.kind == "bco":
        examples = reward_shift(actor.compute_log_prob(examples))
    else:
        others = reference.compute_ref_log_prob(actor.compute_log_prob(mismatched(examples)))
        examples = kl_of(examples, others)
    loss_of = kto_loss(cfg.beta, cfg.desirable, cfg.undesirable, cfg.kind)
    actor.update_actor(examples, loss=loss_of, mini_batches=cfg.mini_batches)
