"""SRPO: self-improving robust preference optimisation (Choi et al. 2024, arXiv 2406.01660).

    L = alpha (beta (h(w) - h(l)) - 1/2)^2                                             the generator pi(y | x)
        + (1 - alpha) [(beta (h(w | l) - h(l | l)) - 1/2)^2                            the reviser pi(y' | x, y)
                       + (beta (h(l | w) - h(w | w)) + 1/2)^2]

h(y | z) = log pi(y | x, z) - log pi_ref(y | x, z): z is a response that is shown, y what it is revised to. One model
has both roles, told apart by the prompt, and improves its own responses when it is asked again. alpha = 1 is beta^2
times IPO.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Preferences, Reference

PAPERS = {
    "srpo": Paper(
        title="SRPO",
        year=2024,
        arxiv="2406.01660",
        rows=(59,),
        status="outline",
        needs=("PREF", "REF", "ALT", "AUX"),
        assumed="alpha 1/2, beta 0.1; both roles' squares add up, in the paper's joint loss they share one",
    )
}


@dataclass(frozen=True, kw_only=True)
class SRPO:
    """Settings of SRPO."""

    alpha: float = 0.5
    """Weight of the generator; the reviser has the rest."""
    beta: float = 0.1
    """Strength of the pull towards the reference."""
    question: str = "{prompt}\n\nA response: {shown_ids}\n\nA better response:"
    """What the reviser is asked about {prompt} and {shown_ids}, the response that it is shown."""


@host_op(
    reads=("response_ids", "response_mask", "label", "group_id"),
    writes=("response_ids", "response_mask", "label", "shown_label"),
    rows="derive",
    scope="groups",
    copies=2,
)
def revisions(batch: Batch) -> HostResult:
    """Each response of a pair as what is shown, and both as what it may be revised to: four rows of one group."""
    shown, said = list[int](), list[int]()
    for rows in batch.group():
        shown += [int(row) for row in rows for _ in rows]
        said += [int(row) for _ in rows for row in rows]
    taken, label = np.array(said, np.int64), batch["label"].values
    columns = {
        "response_ids": batch["response_ids"].take(taken),
        "response_mask": batch["response_mask"].take(taken),
        "label": Column(label[taken]),
        "shown_label": Column(label[shown].astype(np.float32)),
    }
    return HostResult(columns=Batch(columns, len(said)), parent=np.array(shown, np.int64))


@loss(reads=("label", "ref_log_probs"), average="groups")
def generator_loss(model, rows, beta: float = 0.1):
    """The first line of the module's formula."""
    won, lost = chosen_and_rejected(beta * rows.sum_tokens(model.log_probs - rows["ref_log_probs"]), rows)
    return (won - lost - 0.5) ** 2, {"accuracy": (won > lost).to(won.dtype), "margin": (won - lost).detach()}


@loss(reads=("label", "shown_label", "ref_log_probs"), average="groups")
def reviser_loss(model, rows, beta: float = 0.1):
    """The two others. Shown the rejected response the revision to the chosen one gains, and the other way it loses."""
    ratio = beta * rows["label"] * rows.sum_tokens(model.log_probs - rows["ref_log_probs"])
    gains = [rows.sum_groups(ratio * (rows["shown_label"] == shown)) for shown in (-1, 1)]
    value = (gains[0] - 0.5) ** 2 + (-gains[1] + 0.5) ** 2
    return value, {"revision_accuracy": (gains[0] > 0).to(value.dtype)}


@recipe
def srpo(pairs: Preferences, actor: Actor, reference: Reference, cfg: SRPO) -> None:
    """A generator and its own reviser, in one step."""
    asked = revisions(pairs.with_columns_of(pairs, shown_ids="response_ids"))
    asked = reference.compute_ref_log_prob(actor.encode(asked, template=Template(cfg.question)))
    pairs = reference.compute_ref_log_prob(pairs)
    terms = [(pairs, generator_loss(cfg.beta), cfg.alpha), (asked, reviser_loss(cfg.beta), 1 - cfg.alpha)]
    actor.update_actor(terms)
