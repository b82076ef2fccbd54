"""GPM: a general preference model (Zhang et al. 2024, arXiv 2410.02197): preferences that no scalar has.

    s(y > y') = <R v(y), v(y')>,   R: quarter turns of the plane of each two entries of v   skew: s(y > y') = -s(y' > y)
    L = -log sigma(s(w > l))

v(y) is a head of 2 n numbers at the last token, scaled to length sqrt(n); n = 1 can already say rock beats scissors
beats paper beats rock. With all v on a half circle it is Bradley-Terry's order.
"""

from dataclasses import dataclass
from typing import Protocol

from rlhf_dist.algorithms import Head, loss
from rlhf_dist.algorithms.losses.pairs import log_sigmoid
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Preferences

SIZE = 4
"""2 n, the entries of v."""
PAPERS = {
    "general_preference": Paper(
        title="GPM: general preference model",
        year=2024,
        arxiv="2410.02197",
        rows=(99,),
        status="outline",
        needs=("RMT", "HID", "PAIRJ", "ROLL", "PREF", "SNAP"),
        assumed="the prompt's own scale of each plane is left out, tau 1; GPO on its scores is not here, its loss is "
        "sample_pairs/sppo's",
    )
}


@dataclass(frozen=True, kw_only=True)
class GPM:
    """Settings of a general preference model."""

    tau: float = 1.0
    """Scores are divided by it."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


class PreferenceModel(Actor, Protocol):
    """A trunk with an embedding of what it has read."""

    heads = (Head(name="embedding", at="last_token", outputs=SIZE, scale=0.1),)


@loss(reads=("label",), outputs=("heads.embedding",), average="groups")
def skew_preference(model, rows, tau: float = 1.0):
    """-log sigma(<R v(w), v(l)> / tau)."""
    v = model.heads["embedding"]
    v = v * ((v.shape[1] / 2) ** 0.5 / v.norm(dim=1, keepdim=True).clamp(min=1e-6))
    size = v.new_zeros(rows.num_groups, v.shape[1])
    won = size.index_add(0, rows.group_of_row, v * (rows["label"] > 0)[:, None])
    lost = size.index_add(0, rows.group_of_row, v * (rows["label"] < 0)[:, None])
    score = (won[:, 0::2] * lost[:, 1::2] - won[:, 1::2] * lost[:, 0::2]).sum(1) / tau
    value = -log_sigmoid(score)
    return value, {"accuracy": (score > 0).to(value.dtype), "score": score.detach()}


@recipe
def general_preference(pairs: Preferences, judge: PreferenceModel, cfg: GPM) -> None:
    """A skew-symmetric model on pairs."""
    judge.update_actor(pairs, loss=skew_preference(cfg.tau), mini_batches=cfg.mini_batches)
