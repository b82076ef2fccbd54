"""Preferences without a reference: SimPO (Meng et al. 2024, arXiv 2405.14734) and its relatives.

    L = -log sigma(beta mean log pi(y_w) - beta mean log pi(y_l) - gamma)         SimPO: DPO's reward is a mean log-prob

The other losses on the same graph, with their formulas: `_pairs.py`.
"""

from dataclasses import dataclass
from typing import Literal

from recipes.preference._pairs import without_reference
from rlhf_dist.algorithms import simpo
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Preferences

PAPERS = {
    "reference_free": Paper(
        title="SimPO",
        year=2024,
        arxiv="2405.14734",
        rows=(47,),
        needs=("PREF",),
        assumed="beta 2 and gamma 1 are from the middle of the ranges that the paper searches",
    ),
    "cpl": Paper(
        title="Contrastive preference learning (CPL)",
        year=2023,
        arxiv="2310.13639",
        rows=(48,),
        needs=("PREF",),
        settings={"algorithm.kind": "cpl"},
        assumed="alpha 0.1, lambda 0.5 and no discount; a segment is a whole response",
    ),
    "cpo": Paper(
        title="Contrastive preference optimisation (CPO)",
        year=2024,
        arxiv="2401.08417",
        needs=("PREF", "AUX"),
        settings={"algorithm.kind": "cpo", "algorithm.beta": 0.1},
    ),
    "orpo": Paper(
        title="ORPO",
        year=2024,
        arxiv="2403.07691",
        needs=("PREF", "AUX"),
        settings={"algorithm.kind": "orpo", "algorithm.nll_coef": 0.1},
    ),
    "slic": Paper(
        title="SLiC-HF",
        year=2023,
        arxiv="2305.10425",
        status="outline",
        needs=("PREF", "AUX"),
        settings={"algorithm.kind": "slic", "algorithm.nll_coef": 0.1},
        assumed="delta 1 and lambda 0.1; the regulariser's target is the chosen response",
    ),
    "alphapo": Paper(
        title="AlphaPO",
        year=2025,
        arxiv="2501.03884",
        status="outline",
        needs=("PREF",),
        settings={"algorithm.kind": "alphapo", "algorithm.beta": 2.5},
        assumed="beta 2.5, alpha 0.25 and gamma 1; the paper tunes them for each model",
    ),
}


@dataclass(frozen=True, kw_only=True)
class ReferenceFree:
    """Settings of losses without a reference."""

    kind: Literal["simpo", "cpo", "orpo", "slic", "cpl", "alphapo"] = "simpo"
    """The loss on a pair."""
    beta: float | None = None
    """Scale of the (mean) log-probs; None: 2.0 of simpo, else 0.1."""
    gap: float = 1.0
    """gamma of simpo and alphapo, delta of slic."""
    nll_coef: float = 1.0
    """Weight of the likelihood of the chosen response; of orpo that of the odds."""
    alpha: float = 0.25
    """Shape of alphapo's reward; 0 would be simpo."""
    bias: float = 0.5
    """lambda of cpl: how much the rejected response counts."""
    discount: float = 1.0
    """gamma of cpl, for each token."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


@recipe
def reference_free(pairs: Preferences, actor: Actor, cfg: ReferenceFree) -> None:
    """SimPO, or one of its relatives, on given pairs."""
    if cfg.kind == "simpo":
        loss = simpo(2.0 if cfg.beta is None else cfg.beta, cfg.gap)
    else:
        beta = 0.1 if cfg.beta is None else cfg.beta
        shape = {"alpha": cfg.alpha, "bias": cfg.bias, "discount": cfg.discount}
        loss = without_reference(cfg.kind, beta, nll_coef=cfg.nll_coef, gap=cfg.gap, **shape)
    actor.update_actor(pairs, loss=loss, mini_batches=cfg.mini_batches)
