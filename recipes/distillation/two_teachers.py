"""On-policy distillation from two teachers: a weighted sum of their divergences, over the top k tokens of each.

The divergence is GKD's (Agarwal et al. 2023, arXiv 2306.13649).
"""

from dataclasses import dataclass

from rlhf_dist.algorithms import distill_top_k
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Teacher

PAPERS = {
    "two_teachers": Paper(
        title="On-policy distillation from two teachers",
        year=2023,
        arxiv="2306.13649",
        status="outline",
        needs=("ROLL", "XLM"),
        assumed="two teachers are no paper's; the divergence is GKD's",
    )
}


@dataclass(frozen=True, kw_only=True)
class TwoTeachers:
    """Settings of distillation from two teachers."""

    top_k: int = 32
    """Likeliest tokens of each teacher, all others as one."""
    first_share: float = 0.5
    """Weight of the first teacher; the second has the rest of 1."""
    mini_batches: int = 1
    """Optimizer steps for each batch of responses."""


@recipe
def two_teachers(prompts: Prompts, actor: Actor, first: Teacher, second: Teacher, cfg: TwoTeachers) -> None:
    """The actor learns from both over its own responses."""
    batch = actor.generate_sequences(prompts)
    batch = first.compute_top_k(batch, k=cfg.top_k, prefix="first")
    batch = second.compute_top_k(batch, k=cfg.top_k, prefix="second")
    terms = [
        (batch, distill_top_k(prefix="first"), cfg.first_share),
        (batch, distill_top_k(prefix="second"), 1 - cfg.first_share),
    ]
    actor.update_actor(terms, mini_batches=cfg.mini_batches)
