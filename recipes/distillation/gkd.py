"""On-policy distillation (GKD, Agarwal et al. 2023, arXiv 2306.13649): a teacher corrects the student's own responses.

L_t = D(q(. | y_<t) || p(. | y_<t)),  y ~ p          over the whole vocabulary, or the teacher's top k and the rest
"""

from dataclasses import dataclass

from rlhf_dist.algorithms import distill, distill_top_k
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Teacher

PAPERS = {
    "gkd": Paper(
        title="GKD: on-policy distillation",
        year=2023,
        arxiv="2306.13649",
        needs=("ROLL", "XLM"),
    )
}


@dataclass(frozen=True, kw_only=True)
class GKD:
    """Settings of on-policy distillation."""

    kl: str = "reverse"
    """`reverse`, `forward` or `jsd`."""
    beta: float = 0.5
    """Of jsd: the teacher's share of the mixture."""
    top_k: int = 0
    """Likeliest tokens of the teacher, all others as one; 0 for the whole vocabulary."""
    mini_batches: int = 1
    """Optimizer steps for each batch of responses."""


@recipe
def gkd(prompts: Prompts, actor: Actor, teacher: Teacher, cfg: GKD) -> None:
    """The actor learns from the teacher's distributions over its own responses."""
    batch = actor.generate_sequences(prompts)
    if cfg.top_k:
        batch, loss = teacher.compute_top_k(batch, k=cfg.top_k), distill_top_k(cfg.kl, beta=cfg.beta)
    else:
        batch, loss = teacher.compute_hidden(batch), distill("teacher", cfg.kl, beta=cfg.beta)
    actor.update_actor(batch, loss=loss, mini_batches=cfg.mini_batches)
