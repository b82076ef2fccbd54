"""Chain of hindsight (Liu et al. 2023, arXiv 2302.02676): feedback in the context, learned by plain likelihood.

    L = -log pi(y_l, y_w | x, "bad:", "good:") - c log pi(pretraining text)

Rows of `hindsight` are conversations: the user says the question and "bad", the assistant y_l, the user "good", the
assistant y_w. Only what the assistant says has a loss, so the feedback's tokens are masked. Rows of `pretraining`
keep the model a language model.
"""

from dataclasses import dataclass

from rlhf_dist.algorithms import nll
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Examples

PAPERS = {
    "chain_of_hindsight": Paper(
        title="Chain of hindsight",
        year=2023,
        arxiv="2302.02676",
        rows=(64,),
        needs=("SFT", "REF"),
        assumed="the weight 1 of the pretraining loss; no random masking of past tokens",
    )
}


@dataclass(frozen=True, kw_only=True)
class ChainOfHindsight:
    """Settings of chain of hindsight."""

    pretraining_coef: float = 1.0
    """Weight of the pretraining text's likelihood."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the sources."""


@recipe
def chain_of_hindsight(hindsight: Examples, pretraining: Examples, actor: Actor, cfg: ChainOfHindsight) -> None:
    """Likelihood of both, in one step."""
    terms = [(hindsight, nll()), (pretraining, nll(), cfg.pretraining_coef)]
    actor.update_actor(terms, mini_batches=cfg.mini_batches)
