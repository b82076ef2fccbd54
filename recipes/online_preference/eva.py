"""eva: prompts that evolve with the policy (Ye et al. 2024, arXiv 2411.00062): asymmetric self-play.

    info(x) = max_i r(x, y_i) - min_i r(x, y_i)                        how much the solver's responses differ
    creator    draws prompts with chances in proportion to info, and has a language model write new ones from them
    solver     DPO on the best and the worst of the responses to old and new prompts (`learner=rloo`: RLOO)

New prompts are kept until the next step, where the solver answers them beside those of the data; what it finds
informative among both is evolved further. A rule that needs an answer does not do for the reward: they have none.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf_dist.algorithms import dpo, policy_gradient
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.missing import is_missing
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Opponent, Prompts, Reference, Reward, State, state_op
from rlhf_dist.transforms import keep_best_and_worst, rloo_advantage

EVOLVE = """\
Here is a prompt: {prompt}

Write a new prompt that is inspired by it, of the same field, rarer and somewhat harder. Say the new prompt alone."""
NEEDS = ("SAMP", "ROLL", "RM", "PAIR", "PREF", "ADV", "XLM")
ASSUMED = "one new prompt of each that is drawn; a new prompt lives for a step; our own words of the question"
PAPERS = {
    "eva": Paper(title="eva, with DPO", year=2024, arxiv="2411.00062", rows=(90,), needs=NEEDS, assumed=ASSUMED),
    "rloo": Paper(
        title="eva, with RLOO",
        year=2024,
        arxiv="2411.00062",
        rows=(90,),
        needs=NEEDS,
        settings={"algorithm.learner": "rloo"},
        assumed=ASSUMED,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Eva:
    """Settings of asymmetric self-play."""

    samples_per_prompt: int = 4
    """Responses to each prompt."""
    evolved: int = 8
    """New prompts a step."""
    evolve: str = EVOLVE
    """What the creator is asked about {prompt}."""
    learner: Literal["dpo", "rloo"] = "dpo"
    """How the solver learns."""
    beta: float = 0.1
    """DPO's strength of the pull towards the reference."""


class Pool(State):
    """Prompts that were written at the step before, and how many there have ever been."""

    def initial(self, cfg: Eva) -> dict[str, Any]:
        return {"prompts": [], "written": 0}

    @state_op(writes=("group_id", "question", "answer"), rows="new")
    def draw(self, values: dict[str, Any]) -> tuple[dict[str, Any], HostResult]:
        """All of them; no source gives a group a negative id."""
        texts = values["prompts"]
        ids = -1 - values["written"] - np.arange(len(texts))
        columns = {
            "group_id": Column(ids.astype(np.int64)),
            "question": Column.strings(texts),
            "answer": Column.strings([""] * len(texts)),
        }
        return {**values, "written": values["written"] + len(texts)}, HostResult(columns=Batch(columns, len(texts)))

    @state_op(reads=("response",))
    def keep(self, values: dict[str, Any], batch: Batch) -> tuple[dict[str, Any], dict[str, Mean]]:
        """These in their place; empty ones are none."""
        texts = [text.strip() for text in batch["response"].rows() if text.strip()]
        return {**values, "prompts": texts}, {"new_prompts": Mean(float(len(texts)), 0)}


@host_op(reads=("rewards", "group_id"), rows="derive", scope="batch", missing=True)
def informative(batch: Batch, *, count: int, rng: np.random.Generator) -> HostResult:
    """A row of each of `count` groups (fewer where fewer differ), drawn in proportion to how far rewards differ."""
    rewards, groups = batch["rewards"].values.astype(np.float64), batch.group()
    known = ~is_missing(batch["rewards"].values)
    info = np.array([np.ptp(rewards[rows[known[rows]]]) if known[rows].any() else 0.0 for rows in groups])
    drawn = np.empty(0, np.int64)
    if info.sum():
        drawn = rng.choice(len(groups), min(count, int((info > 0).sum())), replace=False, p=info / info.sum())
    rows = np.array([groups[at][0] for at in np.sort(drawn)], np.int64)
    metrics = {"informativeness": Mean(float(info.sum()), float(max(len(groups), 1)))}
    return HostResult(columns=Batch({}, len(rows)), parent=rows, metrics=metrics)


@recipe
def eva(
    prompts: Prompts,
    actor: Actor,
    creator: Opponent,
    reference: Reference,
    reward: Reward,
    pool: Pool,
    cfg: Eva,
) -> None:
    """A solver, and a creator of prompts that it learns from."""
    new = actor.generate_sequences(pool.draw(), template=Template("{question}"), n=cfg.samples_per_prompt)
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = reward.compute_reward(batch.concat(new))
    chosen = informative(batch, count=cfg.evolved)
    pool.keep(creator.generate_sequences(chosen, template=Template(cfg.evolve)))
    if cfg.learner == "dpo":
        actor.update_actor(reference.compute_ref_log_prob(keep_best_and_worst(batch)), loss=dpo(cfg.beta))
    else:
        actor.update_actor(rloo_advantage(batch), loss=policy_gradient())
