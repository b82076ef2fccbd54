"""On-policy distillation from two teachers: the same responses under both, a weight for each.

L = w D(pi, teacher_a) + (1 - w) D(pi, teacher_b)          y ~ pi; see on_policy_distillation
"""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import distill_top_k
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Teacher


@dataclass(frozen=True, kw_only=True)
class TwoTeachers:
    """Settings of distillation from two teachers."""

    samples_per_prompt: int = 1
    """Responses to each prompt."""
    kl: Literal["reverse", "forward", "jsd"] = "reverse"
    """The divergence."""
    first_share: float = 0.5
    """w, the weight of the first teacher."""
    top_k: int = 32
    """Tokens of a teacher at each position."""


@recipe
def two_teachers(prompts: Prompts, actor: Actor, first: Teacher, second: Teacher, cfg: TwoTeachers) -> None:
    """One optimizer step on both divergences."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = first.compute_top_k(batch, k=cfg.top_k, prefix="first")
    batch = second.compute_top_k(batch, k=cfg.top_k, prefix="second")
    terms = ((batch, distill_top_k(cfg.kl, prefix=name)) for name in ("first", "second"))
    actor.update_actor([(*term, w) for term, w in zip(terms, (cfg.first_share, 1 - cfg.first_share), strict=True)])
