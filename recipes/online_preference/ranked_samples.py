"""Lists of the policy's own responses, scored by the reward: EXO with K responses (Ji et al. 2024, arXiv 2402.00856).

    L = KL(softmax_k(beta log pi(y_k)/pi_ref(y_k)) || softmax_k(r(y_k) / tau)),   y_1 ... y_K ~ pi

The reverse of the divergence that DPO's generalisation to K responses takes. The losses are those on given lists
(`recipes/preference/_lists.py` has their formulas).
"""

from dataclasses import dataclass

from recipes.preference._lists import WITH_REFERENCE, ListKind, list_loss
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward

PAPERS = {
    "ranked_samples": Paper(
        title="EXO with K responses",
        year=2024,
        arxiv="2402.00856",
        rows=(41,),
        needs=("ROLL", "RM", "PREF", "REF"),
        assumed="K 4, beta 0.1, tau 1",
    ),
    "brain": Paper(
        title="BRAIn",
        year=2024,
        arxiv="2402.02479",
        rows=(40,),
        status="outline",
        needs=("ROLL", "RM", "PREF", "REF"),
        settings={"algorithm.kind": "brain", "algorithm.samples_per_prompt": 8},
        assumed="the proposal is the policy of the step, the prior the reference; tau 1, 8 responses",
    ),
    "itertl": Paper(
        title="ITERTL: iterated ranking of one's own code",
        year=2024,
        arxiv="2407.12022",
        rows=(162,),
        status="outline",
        needs=("ROLL", "RM", "VER", "PREF", "SNAP"),
        settings={"algorithm.kind": "rrhf"},
        assumed="the ranking loss is RRHF's; the reward is the verifier's score",
    ),
}


@dataclass(frozen=True, kw_only=True)
class RankedSamples:
    """Settings of losses on lists of samples."""

    samples_per_prompt: int = 4
    """Responses to each prompt: the list."""
    kind: ListKind = "exo"
    """The loss on a list."""
    beta: float = 0.1
    """Scale of log-ratios, where the loss has them."""
    nll_coef: float = 0.05
    """Weight of the best response's likelihood in pro."""
    temperature: float = 1.0
    """Of the rewards in exo and brain."""


@recipe
def ranked_samples(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: RankedSamples) -> None:
    """EXO, or another loss, on lists of samples."""
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    if cfg.kind in WITH_REFERENCE:
        batch = reference.compute_ref_log_prob(batch)
    if cfg.kind == "brain":
        batch = actor.compute_log_prob(batch)
    loss = list_loss(cfg.kind, cfg.beta, nll_coef=cfg.nll_coef, temperature=cfg.temperature)
    actor.update_actor(batch, loss=loss)
