"""HyPO: hybrid preference optimisation (Song et al. 2024, arXiv 2406.01462).

    L = L_DPO(offline pairs) + lambda KL(pi || pi_ref)

DPO holds the policy near the reference only where pairs are; responses of the policy's own hold it elsewhere. The KL's
gradient is the score function's: E_y~pi [(log pi(y) - log pi_ref(y)) grad log pi(y)]. lambda is not in our source of
the paper: the default is assumed.
"""

from dataclasses import dataclass

from rlhf_dist.algorithms import dpo, loss
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Preferences, Prompts, Reference

PAPERS = {
    "hypo": Paper(
        title="HyPO",
        year=2024,
        arxiv="2406.01462",
        rows=(60,),
        needs=("PREF", "REF", "ROLL", "AUX", "MIX"),
        assumed="lambda 0.1",
    )
}


@dataclass(frozen=True, kw_only=True)
class HyPO:
    """Settings of HyPO."""

    beta: float = 0.1
    """Strength of DPO's pull towards the reference."""
    kl_coef: float = 0.1
    """lambda, weight of the KL of the policy's own responses."""
    samples_per_prompt: int = 1
    """Responses to each prompt."""


@loss(reads=("ref_log_probs",), average="rows")
def kl_of_samples(model, rows):
    """Its gradient is that of KL(pi || pi_ref), its value the estimate times log pi."""
    log_prob = rows.sum_tokens(model.log_probs)
    ratio = (log_prob - rows.sum_tokens(rows["ref_log_probs"])).detach()
    return ratio * log_prob, {"kl": ratio}


@recipe
def hypo(pairs: Preferences, prompts: Prompts, actor: Actor, reference: Reference, cfg: HyPO) -> None:
    """One step on pairs that are given and on responses that are drawn."""
    offline = reference.compute_ref_log_prob(pairs)
    online = reference.compute_ref_log_prob(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    actor.update_actor([(offline, dpo(cfg.beta)), (online, kl_of_samples(), cfg.kl_coef)])
