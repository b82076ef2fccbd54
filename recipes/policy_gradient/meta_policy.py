"""Meta policy optimisation (Kim et al. 2025, arXiv 2504.20157): the judge's question changes while the policy learns.

    r = judge(rubric_k, x, y),   PPO;   every K steps   rubric_k+1 ~ meta(. | rubric_k, samples with their grades)

A policy that has found how to please a rubric is graded by another one. The rubric is a part of the run's state: it is
in checkpoints, and a run goes on with the one that it had.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.policy_gradient._critic import WithCritic, learn_with_critic
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.parsers import Number, Pattern
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Critic, Judge, Opponent, Prompts, Reference, State, state_op
from rlhf_dist.transforms import verdict_means

RUBRIC = "A good response does what is asked, is true, and is no longer than it must be."
JUDGED = """\
Rubric: {rubric}

Prompt: {prompt}

Response: {response}

Grade the response by the rubric. End with "Score:" and a number from 0 to 10."""
META = """\
A judge grades responses by this rubric: {rubric}

Responses and the grades they were given:

{samples}

Where is the rubric too coarse, and what do responses get away with? Write a better rubric, of a few sentences, between
<rubric> and </rubric>."""
PAPERS = {
    "meta_policy": Paper(
        title="Meta policy optimisation: an evolving rubric",
        year=2025,
        arxiv="2504.20157",
        rows=(125,),
        needs=("JUDGE", "XLM", "STATE", "ROLL", "CRIT"),
        assumed="every 10 steps; the worst and the best of the graded samples are shown; one call of the meta model in "
        "place of its analysis and refinement; our own words of both questions",
    )
}


@dataclass(frozen=True, kw_only=True)
class MetaPolicy(WithCritic):
    """Settings of PPO under an evolving rubric."""

    rubric: str = RUBRIC
    """The first one."""
    every: int = 10
    """K: steps after which it is written anew."""
    shown: int = 4
    """Graded responses that the meta model sees."""
    question: str = JUDGED
    """What the judge is asked about {rubric}, {prompt} and {response}."""
    meta: str = META
    """What the meta model is asked about {rubric} and {samples}."""
    marker: str = "Score:"
    """What stands before a score."""
    begin: str = "<rubric>"
    """What stands before the new rubric in the meta model's answer; empty: the whole answer is one."""
    end: str = "</rubric>"
    """What stands behind it."""


class Rubric(State):
    """The judge's rubric, and how many steps there have been."""

    def initial(self, cfg: MetaPolicy) -> dict[str, Any]:
        return {"text": cfg.rubric, "step": 0, "revisions": 0}

    @state_op(reads=("group_id",), writes=("rubric",))
    def show(self, values: dict[str, Any], batch: Batch) -> tuple[dict[str, Any], HostResult]:
        """The rubric beside each row."""
        column = Column.strings([values["text"]] * batch.num_rows)
        return values, HostResult(columns=Batch({"rubric": column}, batch.num_rows))

    @state_op(reads=("prompt", "response", "rewards"), writes=("samples",), rows="derive")
    def due(
        self, values: dict[str, Any], batch: Batch, *, period: int, shown: int
    ) -> tuple[dict[str, Any], HostResult]:
        """One row every so many steps, with the worst and the best of the graded responses as a text; else none."""
        step = values["step"] + 1
        asked = int(step % period == 0 and batch.num_rows > 0)
        order = np.argsort(batch["rewards"].values, kind="stable")
        picked = np.unique(np.concatenate([order[: shown // 2], order[len(order) - (shown - shown // 2) :]]))
        told = [
            f"Prompt: {batch['prompt'].row(row)}\nResponse: {batch['response'].row(row)}\n"
            f"Grade: {batch['rewards'].values[row]:.1f}"
            for row in map(int, picked)
        ]
        columns = Batch({"samples": Column.strings(["\n\n".join(told)] * asked)}, asked)
        return {**values, "step": step}, HostResult(columns=columns, parent=np.zeros(asked, np.int64))

    @state_op(reads=("new_rubric", "parsed"))
    def revise(self, values: dict[str, Any], batch: Batch) -> tuple[dict[str, Any], dict[str, Mean]]:
        """The new text, if one could be read; else the old one stays."""
        said = [text.strip() for text in batch["new_rubric"].rows()]
        new = next((text for text, good in zip(said, batch["parsed"].values, strict=True) if good and text), None)
        if new is None:
            return values, {"revisions": Mean(float(values["revisions"]), 0)}
        revisions = values["revisions"] + 1
        return {**values, "text": new, "revisions": revisions}, {"revisions": Mean(float(revisions), 0)}


@recipe
def meta_policy(
    prompts: Prompts,
    actor: Actor,
    critic: Critic,
    reference: Reference,
    judge: Judge,
    meta: Opponent,
    rubric: Rubric,
    cfg: MetaPolicy,
) -> None:
    """PPO on grades whose rubric a meta model writes anew."""
    batch = rubric.show(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    score = Number(cfg.marker, low=0, high=10)
    verdicts = judge.generate_sequences(batch, template=Template(cfg.question), parser=score)
    batch, _ = verdict_means(batch, verdicts).where("judged")
    learn_with_critic(batch, actor, critic, reference, cfg)
    asked = rubric.due(batch, period=cfg.every, shown=cfg.shown)
    between = Pattern(f"{cfg.begin}(?P<new_rubric>.*){cfg.end}" if cfg.begin else "(?P<new_rubric>.*)")
    rubric.revise(meta.generate_sequences(asked, template=Template(cfg.meta), parser=between))
