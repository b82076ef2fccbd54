"""How often a model ranks pairs rightly: RewardBench (Lambert et al. 2024, arXiv 2403.13787) and its relatives.

    explicit    r(chosen) > r(rejected)                                a reward model
    implicit    log pi/pi_ref(chosen) > log pi/pi_ref(rejected)        what DPO has made of a policy (2409.03650)
    ranking     pi(chosen) > pi(rejected), and of pi_ref             which stays low while DPO's loss falls (2405.19534)

Metrics: accuracies/explicit_accuracy, implicit_, ranking_ and reference_ranking_accuracy; a tie counts as wrong.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms.ragged import sum_rows
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Preferences, Reference, RewardModel

PAPERS = {
    "pair_accuracy": Paper(
        title="DPO's implicit reward model against an explicit one",
        year=2024,
        arxiv="2409.03650",
        rows=(205,),
        status="study",
        needs=("EVAL", "PREF", "RMT"),
    ),
    "rewardbench": Paper(
        title="RewardBench",
        year=2024,
        arxiv="2403.13787",
        rows=(198,),
        status="study",
        needs=("EVAL", "RM", "PREF"),
        settings={"algorithm.policies": False},
        assumed="one subset of pairs at a time",
    ),
    "ranking_accuracy": Paper(
        title="Preference algorithms do not learn rankings",
        year=2024,
        arxiv="2405.19534",
        rows=(204,),
        status="study",
        needs=("EVAL", "PREF", "REF"),
        settings={"algorithm.reward_model": False},
        assumed="the idealised accuracy, which needs the shares of people behind each label, is not computed",
    ),
}


@dataclass(frozen=True, kw_only=True)
class PairAccuracy:
    """Settings of the measurement."""

    reward_model: bool = True
    """Measure a reward model."""
    policies: bool = True
    """Measure a policy and its reference."""


@host_op(reads=lambda settings: ("label", "group_id", *settings["names"]), scope="groups")
def accuracies(batch: Batch, *, names: tuple[str, ...]) -> HostResult:
    """Of each of these columns, the share of pairs in which the chosen row has more; per-token columns are summed."""
    scores = {}
    for name in names:
        column = batch[name]
        scores[name] = column.values.astype(np.float64)
        if column.offsets is not None:
            scores[name] = sum_rows(column.values, column.offsets)
    if {"old_log_probs", "ref_log_probs"} <= scores.keys():
        scores["implicit"] = scores["old_log_probs"] - scores["ref_log_probs"]
    called = {"rewards": "explicit", "old_log_probs": "ranking", "ref_log_probs": "reference_ranking"}
    groups, metrics = batch.group(), {}
    for name, values in scores.items():
        right = sum(float((values[rows] * batch["label"].values[rows]).sum() > 0) for rows in groups)
        metrics[f"{called.get(name, name)}_accuracy"] = Mean(right, float(len(groups)))
    return HostResult(columns=Batch({}, batch.num_rows), metrics=metrics)


@recipe
def pair_accuracy(
    pairs: Preferences, reward: RewardModel, actor: Actor, reference: Reference, cfg: PairAccuracy
) -> None:
    """Accuracies on pairs."""
    names: tuple[str, ...] = ()
    if cfg.reward_model:
        pairs, names = reward.compute_reward(pairs), ("rewards",)
    if cfg.policies:
        pairs = reference.compute_ref_log_prob(actor.compute_log_prob(pairs))
        names = (*names, "old_log_probs", "ref_log_probs")
    accuracies(pairs, names=names)
