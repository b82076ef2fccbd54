"""Preferences with their reasons (Just et al. 2024, arXiv 2407.14477): DPO, and the likelihood of an explanation.

    L = L_DPO(y_w, y_l) - gamma log pi(rationale | x, y_w > y_l)

Rows of `rationales`: a prompt that holds the question, both responses and which is better; the response says why.
"""

from dataclasses import dataclass

from rlhf_dist.algorithms import dpo, nll
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Examples, Preferences, Reference

PAPERS = {
    "rationale": Paper(
        title="Rationale-enriched DPO",
        year=2024,
        arxiv="2407.14477",
        rows=(57,),
        needs=("PREF", "AUX", "JUDGE"),
        assumed="gamma 1; the rationales, which a language model writes, are given as data",
    )
}


@dataclass(frozen=True, kw_only=True)
class Rationale:
    """Settings of DPO with rationales."""

    beta: float = 0.1
    """Strength of the pull towards the reference."""
    rationale_coef: float = 1.0
    """gamma, weight of a rationale's likelihood."""


@recipe
def rationale(pairs: Preferences, rationales: Examples, actor: Actor, reference: Reference, cfg: Rationale) -> None:
    """One step on pairs and on what is said about pairs."""
    pairs = reference.compute_ref_log_prob(pairs)
    actor.update_actor([(pairs, dpo(cfg.beta)), (rationales, nll(), cfg.rationale_coef)])
