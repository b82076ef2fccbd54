"""Self-supervised preference degrees (SPO, Li et al. 2024, arXiv 2409.17791): DPO, and a head that tells what lacks.

    y^d = y_w without a share d / D of its key tokens,   d = 0 .. D - 1
    L = L_DPO + gamma L_cls,   L_cls = cross-entropy of a head at the last token that names d

What is missing is known without a label, so that the trunk learns what makes a response whole.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rlhf_dist.algorithms import Head, dpo, loss
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Preferences, Reference

DEGREES = 4
"""D."""
PAPERS = {
    "spo_degree": Paper(
        title="Self-supervised preference degree (SPO)",
        year=2024,
        arxiv="2409.17791",
        rows=(56,),
        status="outline",
        needs=("PREF", "AUX", "HID"),
        assumed="four degrees, gamma 0.1; key tokens are those that are rarest in the step's chosen responses",
    )
}


@dataclass(frozen=True, kw_only=True)
class SPODegree:
    """Settings of DPO with degrees."""

    beta: float = 0.1
    """Strength of the pull towards the reference."""
    degree_coef: float = 0.1
    """gamma, weight of the degrees' cross-entropy."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


class Degrees(Actor, Protocol):
    """A policy that also says how much is missing."""

    heads = (Head(name="degree", at="last_token", outputs=DEGREES, scale=0.1),)


@host_op(
    reads=("response_ids", "label"),
    writes=("response_ids", "response_mask", "degree"),
    rows="derive",
    scope="batch",
    copies=DEGREES,
)
def thinned(batch: Batch) -> HostResult:
    """Each chosen response at every degree: without its round(d / D n) rarest tokens, of n and its last one, which
    stays. Of equally rare ones the first goes first."""
    chosen = np.flatnonzero(batch["label"].values > 0)
    ids = batch["response_ids"]
    tokens, counts = np.unique(ids.take(chosen).values, return_counts=True)
    made, degrees = [], []
    for row in chosen:
        said = ids.row(int(row))
        rarest = np.argsort(counts[np.searchsorted(tokens, said[:-1])], kind="stable")
        for degree in range(DEGREES):
            made.append(np.delete(said, rarest[: round(degree / DEGREES * len(rarest))]))
            degrees.append(degree)
    column = Column.ragged(made, dtype="int32")
    columns = {
        "response_ids": column,
        "response_mask": Column(np.ones(len(column.values), np.uint8), column.offsets),
        "degree": Column(np.array(degrees, np.float32)),
    }
    return HostResult(columns=Batch(columns, len(made)), parent=chosen.repeat(DEGREES))


@loss(reads=("degree",), outputs=("heads.degree",), average="rows")
def degree_loss(model, rows):
    """Cross-entropy of the head."""
    said, wanted = model.heads["degree"].log_softmax(-1), rows["degree"].long()
    value = -said.gather(-1, wanted[:, None])[:, 0]
    return value, {"degree_accuracy": (said.argmax(-1) == wanted).to(value.dtype)}


@recipe
def spo_degree(pairs: Preferences, actor: Degrees, reference: Reference, cfg: SPODegree) -> None:
    """DPO and the degrees, in one step."""
    pairs = reference.compute_ref_log_prob(pairs)
    terms = [(pairs, dpo(cfg.beta)), (thinned(pairs), degree_loss(), cfg.degree_coef)]
    actor.update_actor(terms, mini_batches=cfg.mini_batches)
