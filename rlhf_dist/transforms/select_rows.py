"""Ops that drop rows by the rewards of their group: pairs for DPO, filters for RAFT, DAPO and Reinforce-Rej."""

from __future__ import annotations

import numpy as np

from rlhf_dist.algorithms.advantages.baselines import all_equal
from rlhf_dist.algorithms.ragged import FloatArray
from rlhf_dist.batch import Batch, Column, IntArray
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import Mean
from rlhf_dist.transforms.columns import group_metrics, groups, mean_of, numbers


@host_op(reads=("rewards", "group_id"), writes=("label", "margin"), scope="groups", rows="drop", least_group=2)
def keep_best_and_worst(batch: Batch) -> HostResult:
    """Each group's row with the highest reward (label +1) and with the lowest (label -1); margin: their gap.

    The first row wins a tie. Groups whose rewards are all equal hold no preference: dropped and counted.
    """
    rewards, group = numbers(batch, "rewards"), groups(batch)
    unequal = ~all_equal(rewards, group)
    best, worst = _first_of_largest(rewards, group)[unequal], _first_of_largest(-rewards, group)[unequal]
    label = np.zeros(batch.num_rows, dtype=np.int8)
    label[best], label[worst] = 1, -1
    margin = np.zeros(batch.num_rows, dtype=np.float32)
    margin[best] = margin[worst] = rewards[best] - rewards[worst]
    keep = np.flatnonzero(label)
    return HostResult(
        columns=Batch({"label": Column(label[keep]), "margin": Column(margin[keep])}, len(keep)),
        keep=keep,
        metrics={
            "pairs": Mean(float(len(best)), 0),
            **group_metrics(~unequal),
            "pair_margin": mean_of(rewards[best] - rewards[worst]),
        },
    )


@host_op(reads=("rewards", "group_id"), scope="groups", rows="drop", least_group=2)
def drop_equal_groups(batch: Batch) -> HostResult:
    """Drops every group whose rewards are all equal.

    DAPO's dynamic sampling filter (2503.14476, eq. 11) and Reinforce-Rej's (2504.11343), which it equals for
    rewards of 0 and 1.
    """
    rewards, group = numbers(batch, "rewards"), groups(batch)
    equal = all_equal(rewards, group)
    return _kept(np.flatnonzero(~equal[group]), group_metrics(equal))


@host_op(reads=("rewards", "group_id"), scope="groups", rows="drop")
def best_of_group(batch: Batch) -> HostResult:
    """Keeps each group's first row with the highest reward: RAFT (Dong et al. 2023, 2304.06767)."""
    rewards = numbers(batch, "rewards")
    keep = np.sort(_first_of_largest(rewards, groups(batch)))
    return _kept(keep, {"best_reward": mean_of(rewards[keep])})


def _first_of_largest(scores: FloatArray, group: IntArray) -> IntArray:
    """[G]: the first row of each group with the group's largest score."""
    order = np.lexsort((np.arange(len(scores)), -scores, group))
    first: IntArray = order[np.unique(group[order], return_index=True)[1]]
    return first


def _kept(keep: IntArray, metrics: dict[str, Mean]) -> HostResult:
    return HostResult(columns=Batch({}, len(keep)), keep=keep, metrics={**metrics})
