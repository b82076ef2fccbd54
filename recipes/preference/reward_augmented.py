"""Reward-augmented preference data (Zhang et al. 2024, arXiv 2410.08067): each pair is learned twice, under two goals.

    (x, goal r_w):  y_w > y_l            goal-conditioned rewards R(x, y, g) = -(g - r(x, y))^2
    (x, goal r_l):  y_l > y_w            DPO on the 2N pairs; a prompt is answered under the highest goal

DPO on the pair alone unlearns a rejected response however good it is. A reward model scores both responses; the goal is
written into the prompt.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import dpo
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Preferences, Reference, RewardModel

PAPERS = {
    "reward_augmented": Paper(
        title="Reward-augmented data for DPO",
        year=2024,
        arxiv="2410.08067",
        rows=(54,),
        needs=("PREF", "REF", "RM"),
        assumed="the wording of the goal; it stands before the prompt",
    )
}


@dataclass(frozen=True, kw_only=True)
class RewardAugmented:
    """Settings of DPO under goals."""

    beta: float = 0.1
    """Strength of the pull towards the reference."""
    goal: str = "Answer with a quality of {goal:.1f}. {prompt}"
    """The prompt under a goal."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


@host_op(
    reads=("rewards", "label", "group_id"),
    writes=("label", "goal", "group_id"),
    rows="derive",
    scope="groups",
    copies=2,
)
def under_goals(batch: Batch) -> HostResult:
    """Two pairs of each: under the goal of its chosen response's reward as it is, under that of the other one turned.

    The second has the negative id of its group, less one, which no source gives. Pairs without both rewards are left
    out.
    """
    label, rewards = batch["label"].values, batch["rewards"].values
    parents, labels, goals, ids, wrong = list[int](), list[int](), list[float](), list[int](), 0
    groups = batch.group()
    for rows in groups:
        if np.isnan(rewards[rows]).any():
            continue
        won, lost = rows[label[rows] > 0][0], rows[label[rows] < 0][0]
        wrong += rewards[lost] > rewards[won]
        group = int(batch["group_id"].values[won])
        parents += [won, lost, lost, won]
        labels += [1, -1, 1, -1]
        goals += [float(rewards[won])] * 2 + [float(rewards[lost])] * 2
        ids += [group] * 2 + [-group - 1] * 2
    columns = {
        "label": Column(np.array(labels, np.int8)),
        "goal": Column(np.array(goals, np.float32)),
        "group_id": Column(np.array(ids, np.int64)),
    }
    pairs = len(parents) // 4
    metrics = {"reward_disagrees": Mean(float(wrong), float(pairs)), "unscored": Mean(float(len(groups) - pairs), 0)}
    known = {name: one for name, one in metrics.items() if one.count or name == "unscored"}
    return HostResult(columns=Batch(columns, len(parents)), parent=np.array(parents, np.int64), metrics=known)


@recipe
def reward_augmented(
    pairs: Preferences, actor: Actor, reference: Reference, reward: RewardModel, cfg: RewardAugmented
) -> None:
    """DPO on each pair under two goals."""
    pairs = under_goals(reward.compute_reward(pairs))
    pairs = reference.compute_ref_log_prob(actor.encode(pairs, template=Template(cfg.goal)))
    actor.update_actor(pairs, loss=dpo(cfg.beta), mini_batches=cfg.mini_batches)
