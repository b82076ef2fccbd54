"""VULPO (Li et al. 2025, arXiv 2511.11896): a reward of several parts for finding vulnerabilities, by difficulty.

    r(y) = d_label d_sample (correct(y) + a located(y) + b relevant(y))          Dr. GRPO's advantage on r

correct and located are rules, relevant a judge's score from 0 to 10, over 10. d_sample = 2 - the share of the group
that is correct; d_label = 2 - the share of all responses so far, to prompts of the same label (its `answer`), that are.
Both are 1 for what is solved and 2 for what is not. The standard deviation of a group would undo a scale, so the
advantage is not divided by it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.policy_gradient.judge_grpo import POINTWISE
from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.parsers import Number
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Judge, Prompts, Reward, State, state_op
from rlhf_dist.transforms import grpo_advantage, verdict_means

PAPERS = {
    "vulpo": Paper(
        title="VULPO",
        year=2025,
        arxiv="2511.11896",
        rows=(44,),
        status="outline",
        needs=("ROLL", "JUDGE", "VER", "SHAPE", "ADV"),
        assumed="weights 1/2, both scales and their range from 1 to 2, no division by the standard deviation",
    )
}


@dataclass(frozen=True, kw_only=True)
class VULPO:
    """Settings of VULPO."""

    samples_per_prompt: int = 8
    """Responses to each prompt: the group."""
    located_weight: float = 0.5
    """a, of the rule that says whether the place is right."""
    relevant_weight: float = 0.5
    """b, of the judge's score."""
    right: float = 0.5
    """A response is correct whose reward is above this."""
    question: str = POINTWISE
    """What the judge is asked about {prompt} and {response}."""
    marker: str = "Score:"
    """What stands before the score, 0 to 10, in its answer."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""


class Labels(State):
    """How often responses to prompts of each label were correct."""

    def initial(self, cfg: VULPO) -> dict[str, Any]:
        return {"asked": {}, "correct": {}}

    @state_op(reads=("answer", "rewards"), writes=("label_scale",))
    def scale(self, values: dict[str, Any], batch: Batch, *, right: float) -> tuple[dict[str, Any], HostResult]:
        """d_label of every row, by all responses so far, this step's included."""
        asked, correct = dict(values["asked"]), dict(values["correct"])
        labels = batch["answer"].rows()
        for label, one in zip(labels, batch["rewards"].values > right, strict=True):
            asked[label] = asked.get(label, 0) + 1
            correct[label] = correct.get(label, 0) + int(one)
        scale = np.array([2 - correct[label] / asked[label] for label in labels], np.float32)
        made = HostResult(columns=Batch({"label_scale": Column(scale)}, batch.num_rows))
        return {"asked": asked, "correct": correct}, made


@host_op(reads=("rewards", "located", "relevant", "label_scale", "group_id"), writes=("rewards",), scope="groups")
def scaled_sum(batch: Batch, *, located_weight: float, relevant_weight: float, right: float) -> HostResult:
    """The module's r."""
    correct, scale = batch["rewards"].values, batch["label_scale"].values.copy()
    for rows in batch.group():
        scale[rows] *= 2 - (correct[rows] > right).mean()
    parts = correct + located_weight * batch["located"].values + relevant_weight * batch["relevant"].values / 10
    rows = float(batch.num_rows)
    metrics = {"correct": Mean(float(correct.sum()), rows), "difficulty": Mean(float(scale.sum()), rows)}
    columns = Batch({"rewards": Column((scale * parts).astype(np.float32))}, batch.num_rows)
    return HostResult(columns=columns, metrics=metrics if batch.num_rows else {})


@recipe
def vulpo(
    prompts: Prompts, actor: Actor, reward: Reward, located: Reward, judge: Judge, labels: Labels, cfg: VULPO
) -> None:
    """Dr. GRPO on a sum of rewards that counts for more where it is hard."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    parser = Number(cfg.marker, low=0, high=10)
    verdicts = judge.generate_sequences(batch, template=Template(cfg.question), parser=parser)
    batch, _ = verdict_means(batch, verdicts, into="relevant").where("judged")
    batch = located.compute_reward(reward.compute_reward(batch), out="located")
    batch = scaled_sum(
        labels.scale(batch, right=cfg.right),
        located_weight=cfg.located_weight,
        relevant_weight=cfg.relevant_weight,
        right=cfg.right,
    )
    actor.update_actor(grpo_advantage(batch, scale=False), loss=ppo_clip(cfg.clip, on_policy=True))
