"""Critique-GRPO (Zhang et al. 2025, arXiv 2506.03106): refinements after a critique join the group they come from.

    y_1 ... y_n ~ pi(. | x), each is criticised and refined:   y'_i ~ pi(. | x, y_i, c_i)
    A over y_1 ... y_n and the best y' of the prompt, as one group (GRPO)
    own rows        PPO's clipped ratio
    refined rows    -A f(pi(y'_t | x)),   f(p) = p / (p + gamma);   no importance weight, no clip

f raises tokens that the policy finds unlikely the most. A refinement is trained as an answer to the prompt itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_dist.algorithms import loss, ppo_clip
from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.parsers import Pattern
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Judge, Prompts, Reward
from rlhf_dist.transforms import best_of_group, grpo_advantage, mark_rows

if TYPE_CHECKING:
    from torch import Tensor

PAPERS = {
    "critique_grpo": Paper(
        title="Critique-GRPO",
        year=2025,
        arxiv="2506.03106",
        rows=(151,),
        status="outline",
        needs=("ROLL", "VER", "JUDGE", "BRANCH", "MIX", "ADV"),
        assumed="gamma 0.1; the best refinement of each prompt joins, be it right or not, as one row of its "
        "group; the words of both questions",
    )
}
CRITIQUE = """\
Question: {question}

Answer: {answer_given}

Is the answer right? Explain step by step what is wrong with it, if anything is."""
REFINE = """\
Question: {question}

Answer: {answer_given}

Critique: {critique}

Answer the question again, and better."""


@dataclass(frozen=True, kw_only=True)
class CritiqueGRPO:
    """Settings of Critique-GRPO."""

    samples_per_prompt: int = 7
    """Responses to each prompt; one refinement joins them."""
    critique: str = CRITIQUE
    """What the judge is asked about {question} and {answer_given}."""
    refine: str = REFINE
    """What the policy is asked then; {critique} is what the judge said."""
    gamma: float = 0.1
    """Of f(p) = p / (p + gamma)."""
    clip: float = 0.2
    """The probability ratio of own rows is cut at 1 - clip and 1 + clip."""


@loss(reads=("advantages",), average="tokens")
def shaped_likelihood(model: ModelOutput, rows: Rows, gamma: float = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """-A p / (p + gamma), p the probability of the token."""
    chance = model.log_probs.exp()
    value = -rows["advantages"] * chance / (chance + gamma)
    return value, {"refined_loss": value.detach()}


@recipe
def critique_grpo(prompts: Prompts, actor: Actor, judge: Judge, reward: Reward, cfg: CritiqueGRPO) -> None:
    """GRPO with refinements of one's own answers."""
    prompts = prompts.with_columns_of(prompts, question="prompt")
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    own = batch.with_columns_of(batch, answer_given="response")
    said = Pattern(r"(?P<critique>.+)")
    criticised, _ = judge.generate_sequences(own, template=Template(cfg.critique), parser=said).where("parsed")
    refined = actor.generate_sequences(criticised, template=Template(cfg.refine))
    refined = refined.join(prompts, prompt_ids="prompt_ids", prompt="prompt")
    refined = best_of_group(reward.compute_reward(refined))
    names = ("prompt_ids", "response_ids", "response_mask", "rewards")
    batch = mark_rows(batch.select(*names, "group_id"), column="refined", number=0)
    batch = batch.concat(mark_rows(refined.select(*names, "group_id"), column="refined", number=1))
    batch = grpo_advantage(actor.compute_log_prob(batch))
    refined, own = batch.where("refined")
    actor.update_actor([(own, ppo_clip(cfg.clip)), (refined, shaped_likelihood(cfg.gamma), 1 / cfg.samples_per_prompt)])
