"""On-policy distillation (Agarwal et al. 2023, GKD, arXiv 2306.13649; Gu et al. 2023, MiniLLM, arXiv 2306.08543).

    L = mean over tokens of D(pi(.|x, y<t), teacher(.|x, y<t))          y ~ pi

D is the reverse or the forward KL, or the generalised Jensen-Shannon divergence, over the whole vocabulary, or over the
teacher's k likeliest tokens with all others as one outcome.
"""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import distill, distill_top_k
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Teacher


@dataclass(frozen=True, kw_only=True)
class OnPolicyDistillation:
    """Settings of on-policy distillation."""

    samples_per_prompt: int = 1
    """Responses to each prompt."""
    kl: Literal["reverse", "forward", "jsd"] = "reverse"
    """The divergence."""
    beta: float = 0.5
    """Of jsd: the teacher's share of the mixture."""
    top_k: int = 0
    """Tokens of the teacher at each position; 0: the whole vocabulary."""


@recipe
def on_policy_distillation(prompts: Prompts, actor: Actor, teacher: Teacher, cfg: OnPolicyDistillation) -> None:
    """The student's own responses, the teacher's distributions."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    if cfg.top_k:
        batch = teacher.compute_top_k(batch, k=cfg.top_k)
        actor.update_actor(batch, loss=distill_top_k(cfg.kl, beta=cfg.beta))
    else:
        batch = teacher.compute_hidden(batch)
        actor.update_actor(batch, loss=distill("teacher", cfg.kl, beta=cfg.beta))
