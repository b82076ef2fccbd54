"""TYPO (Hu, He and Wipf 2024, arXiv 2407.09072): preferences without the reference, the reference without preferences.

    L = -log s(log pi(y_w) - log pi(y_l)) + lambda KL(pi_ref || pi)

The first term is the data's alone, and says which of two is likelier; the second holds the policy where the reference
is good. lambda -> 0 is the preference distribution, lambda -> infinity the reference. The KL's gradient needs responses
of the reference: -E_{y ~ pi_ref} grad log pi(y).
"""

from dataclasses import dataclass

from recipes.preference._pairs import without_reference
from rlhf_dist.algorithms import loss
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Preferences, Prompts, Reference

PAPERS = {
    "typo": Paper(
        title="TYPO: new desiderata for DPO",
        year=2024,
        arxiv="2407.09072",
        rows=(55,),
        status="outline",
        needs=("PREF", "REF", "ROLL", "AUX"),
        assumed="the formula is from memory of the paper; lambda 1; one response of the reference for each prompt",
    )
}


@dataclass(frozen=True, kw_only=True)
class TYPO:
    """Settings of TYPO."""

    kl_coef: float = 1.0
    """lambda."""
    samples_per_prompt: int = 1
    """Responses of the reference to each prompt."""


@loss(reads=("ref_log_probs",), average="rows")
def kl_from_reference(model, rows):
    """log pi_ref(y) - log pi(y) of a response that the reference drew: on average KL(pi_ref || pi)."""
    value = rows.sum_tokens(rows["ref_log_probs"] - model.log_probs)
    return value, {"kl": value.detach()}


@recipe
def typo(pairs: Preferences, prompts: Prompts, actor: Actor, reference: Reference, cfg: TYPO) -> None:
    """One step on given pairs and on what the reference says."""
    drawn = reference.compute_ref_log_prob(reference.generate_sequences(prompts, n=cfg.samples_per_prompt))
    likelier = without_reference("cpo", 1.0, nll_coef=0.0)
    actor.update_actor([(pairs, likelier), (drawn, kl_from_reference(), cfg.kl_coef)])
