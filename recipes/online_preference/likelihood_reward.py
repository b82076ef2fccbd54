"""The likelihood of what would be said next as the reward: FLR (Zhang et al. 2024, arXiv 2409.13948).

    r(x, y) = sum_u sign_u log p(u | x, y)

u are texts such as "Thank you" (+1) and "That is wrong" (-1), or, after a question, "Yes" (+1) and "No" (-1).

p is a frozen model's. Nothing is generated and nothing parsed. Rows of `followups`: `prompt`, what is asked after the
response (may be one blank), `response`, the text u, and `sign`; a step reads as many of them as
data.sources.followups.rows_per_step says, so set it to how many there are. Both models have one tokenizer.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_dist.algorithms import dpo, ppo_clip
from rlhf_dist.algorithms.ragged import sum_rows
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Examples, LanguageModel, Prompts, Reference
from rlhf_dist.transforms import grpo_advantage, keep_best_and_worst

PAPERS = {
    "likelihood_reward": Paper(
        title="FLR: follow-up likelihood as reward",
        year=2024,
        arxiv="2409.13948",
        rows=(88,),
        needs=("XLM", "ALT", "ROLL", "PAIR", "PREF"),
        assumed="the texts, and that each counts alike, are given as data",
    ),
    "zyn": Paper(
        title="ZYN: yes or no of a frozen model",
        year=2023,
        arxiv="2308.06385",
        rows=(124,),
        needs=("XLM", "ALT", "ROLL", "REF", "CRIT"),
        settings={"algorithm.learner": "grpo"},
        assumed="several questions add up; GRPO with the KL in the reward, in place of PPO",
    ),
    "rlbff": Paper(
        title="RLBFF: binary flexible feedback",
        year=2025,
        arxiv="2509.21319",
        rows=(121,),
        status="outline",
        needs=("RMT", "JUDGE", "ROLL", "ADV"),
        settings={"algorithm.learner": "grpo", "algorithm.kl_coef": 0.0},
        assumed="the model that answers Yes or No to a principle is given; its training is the recipe sft",
    ),
}
MOST_FOLLOWUPS = 16


@dataclass(frozen=True, kw_only=True)
class LikelihoodReward:
    """Settings of learning from likelihoods."""

    samples_per_prompt: int = 4
    """Responses to each prompt."""
    learner: Literal["dpo", "grpo"] = "dpo"
    """DPO on the best and the worst, or GRPO."""
    beta: float = 0.1
    """DPO's strength of the pull towards the reference."""
    kl_coef: float = 0.02
    """GRPO's penalty on log pi - log pi_ref in the reward."""
    clip: float = 0.2
    """GRPO's: the ratio is cut at 1 - clip and 1 + clip."""


class FollowUps(Examples):
    """What may be said next, and whether it is good."""

    fields = {"sign": "float32"}


@host_op(
    reads=(("prompt_ids", "response_ids", "finished"), ("prompt_ids", "response_ids", "response_mask", "sign")),
    writes=("prompt_ids", "response_ids", "response_mask", "sign"),
    rows="derive",
    scope="batch",
    copies=MOST_FOLLOWUPS,
)
def followed_up(batch: Batch, followups: Batch) -> HostResult:
    """A row for each response and follow-up: (prompt, response without its end, what is asked), then the text."""
    if followups.num_rows > MOST_FOLLOWUPS:
        raise ValueError(
            f"a step takes at most {MOST_FOLLOWUPS} follow-ups, got {followups.num_rows}; set rows_per_step"
        )
    prompts, parents = [], np.arange(batch.num_rows).repeat(followups.num_rows)
    for row in range(batch.num_rows):
        said = batch["response_ids"].row(row)
        said = said[: len(said) - int(batch["finished"].values[row])]
        for one in range(followups.num_rows):
            prompts.append(np.concatenate([batch["prompt_ids"].row(row), said, followups["prompt_ids"].row(one)]))
    rows = np.tile(np.arange(followups.num_rows), batch.num_rows)
    columns = {
        "prompt_ids": Column.ragged(prompts, dtype="int32"),
        "response_ids": followups["response_ids"].take(rows),
        "response_mask": followups["response_mask"].take(rows),
        "sign": Column(followups["sign"].values[rows]),
    }
    return HostResult(columns=Batch(columns, len(rows)), parent=parents)


@host_op(
    reads=(("row_id", "group_id"), ("parent_id", "sign", "log_probs", "response_mask", "group_id")),
    writes=("rewards",),
    scope="groups",
)
def likelihoods(batch: Batch, said: Batch) -> Batch:
    """The signed sum of the follow-ups' log-probs, for each response."""
    mask = said["response_mask"]
    log_prob = sum_rows(said["log_probs"].values * (mask.values > 0), mask.offsets) * said["sign"].values
    found = dict.fromkeys(batch["row_id"].values.tolist(), 0.0)
    for parent, one in zip(said["parent_id"].values.tolist(), log_prob.tolist(), strict=True):
        found[parent] += one
    return Batch({"rewards": Column(np.array(list(found.values()), np.float32))}, batch.num_rows)


@recipe
def likelihood_reward(
    prompts: Prompts,
    followups: FollowUps,
    actor: Actor,
    frozen: LanguageModel,
    reference: Reference,
    cfg: LikelihoodReward,
) -> None:
    """DPO or GRPO on what a frozen model expects to hear next."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = likelihoods(batch, frozen.compute_log_prob(followed_up(batch, followups)))
    if cfg.learner == "dpo":
        actor.update_actor(reference.compute_ref_log_prob(keep_best_and_worst(batch)), loss=dpo(cfg.beta))
        return
    if cfg.kl_coef:
        batch = reference.compute_ref_log_prob(actor.compute_log_prob(batch))
    batch = grpo_advantage(batch, kl_coef=cfg.kl_coef)
    actor.update_actor(batch, loss=ppo_clip(cfg.clip, on_policy=True))
