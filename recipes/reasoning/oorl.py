"""OORL with GEPO (Wu et al. 2025, arXiv 2505.12723): code is translated, by unit tests and by equivalent programs.

    online     GRPO on r = 1 if the unit tests pass
    offline    a group of representations of one program, equivalent ones E and others N; s = beta log pi/pi_ref
               L = mean_{i in E, j in N} -log s(s_i - s_j) + c mean_{i in E} (s_i - mean_E s)^2
    L_OORL = L_GRPO + w L

Equivalent ones are above the others and level with each other. One of each kind is DPO. Rows of `groups`: prompt,
response and `score`, 1 for equivalent and 0 for not; those of one prompt are a group and stand together.
"""

from dataclasses import dataclass

from recipes.preference.rankings import Scored, lists_of_prompts
from rlhf_dist.algorithms import loss, ppo_clip
from rlhf_dist.algorithms.losses.pairs import log_sigmoid
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import grpo_advantage

PAPERS = {
    "oorl": Paper(
        title="OORL with GEPO",
        year=2025,
        arxiv="2505.12723",
        rows=(43,),
        status="outline",
        needs=("ROLL", "VER", "MIX", "PREF", "AUX"),
        assumed="GRPO on the policy; GEPO's form, its beta 0.1, c 1 and w 1; equal ones are those that are equivalent",
    )
}


@dataclass(frozen=True, kw_only=True)
class OORL:
    """Settings of OORL."""

    samples_per_prompt: int = 8
    """Responses to each prompt: the group."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    beta: float = 0.1
    """Scale of log-ratios in the offline loss."""
    level_coef: float = 1.0
    """c, weight of the spread among equivalent ones."""
    offline_coef: float = 1.0
    """w, weight of the offline loss."""


@loss(reads=("rewards", "ref_log_probs"), average="groups")
def group_preference(model, rows, beta: float = 0.1, *, level_coef: float = 1.0):
    """L of the module; rewards above 1/2 are equivalent. A group of one kind alone has only its spread, or nothing."""
    score = beta * rows.sum_tokens(model.log_probs - rows["ref_log_probs"])
    same = rows.group_of_row[:, None] == rows.group_of_row[None, :]
    good = (rows["rewards"] > 0.5).to(score.dtype)
    pair = (same * good[:, None] * (1 - good)[None, :]).to(score.dtype)
    above = rows.sum_groups((pair * -log_sigmoid(score[:, None] - score[None, :])).sum(1))
    above = above / rows.sum_groups(pair.sum(1)).clamp(min=1)
    count = rows.sum_groups(good).clamp(min=1)
    mean = rows.sum_groups(good * score) / count
    spread = rows.sum_groups(good * (score - mean[rows.group_of_row]) ** 2) / count
    return above + level_coef * spread, {"group_preference": above.detach(), "spread": spread.detach()}


@recipe
def oorl(prompts: Prompts, groups: Scored, actor: Actor, reference: Reference, reward: Reward, cfg: OORL) -> None:
    """GRPO and groups of equivalent programs, in one step."""
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    offline = reference.compute_ref_log_prob(lists_of_prompts(groups))
    terms = [(grpo_advantage(batch), ppo_clip(cfg.clip, on_policy=True))]
    actor.update_actor([*terms, (offline, group_preference(cfg.beta, level_coef=cfg.level_coef), cfg.offline_coef)])
