"""Ops that drop rows by the rewards of their group: pairs for DPO, filters for RAFT, DAPO and Reinforce-Rej."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rlhf_dist.algorithms.advantages.baselines import all_equal
from rlhf_dist.algorithms.ragged import FloatArray
from rlhf_dist.batch import Batch, Column, IntArray
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import Mean
from rlhf_dist.transforms.columns import group_metrics, groups, mean_of, numbers, present_rows


@host_op(
    reads=("rewards", "group_id"), writes=("label", "margin"), scope="groups", rows="drop", least_group=2, missing=True
)
def keep_best_and_worst(batch: Batch) -> HostResult:
    """Each group's row with the highest reward (label +1) and with the lowest (label -1); margin: their gap.

    The first row wins a tie (`ties`: share of the pairs with another row as good or as bad). Groups whose rewards are
    all equal hold no preference: dropped and counted. So are rows whose reward is missing, before anything else.
    """
    present, rewards, group = _present(batch)
    equal = all_equal(rewards, group)
    best, worst = _first_of_largest(rewards, group)[~equal], _first_of_largest(-rewards, group)[~equal]
    label = np.zeros(len(rewards), dtype=np.int8)
    label[best], label[worst] = 1, -1
    margin = np.zeros(len(rewards), dtype=np.float32)
    margin[best] = margin[worst] = rewards[best] - rewards[worst]
    keep = np.flatnonzero(label)
    tied = (_times_largest(rewards, group) > 1) | (_times_largest(-rewards, group) > 1)
    return HostResult(
        columns=Batch({"label": Column(label[keep]), "margin": Column(margin[keep])}, len(keep)),
        keep=present[keep],
        metrics={
            "pairs": Mean(float(len(best)), 0),
            "ties": mean_of(tied[~equal]),
            **_group_metrics(batch, equal, group),
            "pair_margin": mean_of(rewards[best] - rewards[worst]),
        },
    )


@host_op(reads=("rewards", "group_id"), scope="groups", rows="drop", least_group=2, missing=True)
def drop_equal_groups(batch: Batch) -> HostResult:
    """Drops every group whose rewards are all equal, and rows whose reward is missing.

    DAPO's dynamic sampling filter (2503.14476, eq. 11) and Reinforce-Rej's (2504.11343), which it equals for
    rewards of 0 and 1.
    """
    present, rewards, group = _present(batch)
    equal = all_equal(rewards, group)
    return _kept(present[~equal[group]], _group_metrics(batch, equal, group))


@host_op(reads=("rewards", "group_id"), scope="groups", rows="drop", missing=True)
def best_of_group(batch: Batch) -> HostResult:
    """Keeps each group's first row with the highest reward: RAFT (Dong et al. 2023, 2304.06767).

    A row whose reward is missing is no group's best; `ties`: share of groups with several that are.
    """
    present, rewards, group = _present(batch)
    best = np.sort(_first_of_largest(rewards, group))
    metrics = {"best_reward": mean_of(rewards[best]), "ties": mean_of(_times_largest(rewards, group) > 1)}
    return _kept(present[best], metrics | _missing(batch, present))


@host_op(reads=("rewards",), scope="rows", rows="drop", missing=True)
def drop_missing(batch: Batch) -> HostResult:
    """Drops rows whose reward is missing, and counts them: for ops that take no such rows."""
    present = present_rows(numbers(batch, "rewards", missing=True))
    return _kept(present, _missing(batch, present))


def _present(batch: Batch) -> tuple[IntArray, FloatArray, IntArray]:
    """Rows with a reward, their rewards, and their groups."""
    rewards = numbers(batch, "rewards", missing=True)
    present = present_rows(rewards)
    return present, rewards[present], groups(batch, present)


def _group_metrics(batch: Batch, equal: npt.NDArray[np.bool_], group: IntArray) -> dict[str, Mean]:
    return {**group_metrics(equal, group), "missing_rewards": Mean(float(batch.num_rows - len(group)), 0)}


def _missing(batch: Batch, present: IntArray) -> dict[str, Mean]:
    return {"missing_rewards": Mean(float(batch.num_rows - len(present)), 0)}


def _first_of_largest(scores: FloatArray, group: IntArray) -> IntArray:
    """[G]: the first row of each group with the group's largest score."""
    order = np.lexsort((np.arange(len(scores)), -scores, group))
    first: IntArray = order[np.unique(group[order], return_index=True)[1]]
    return first


def _times_largest(scores: FloatArray, group: IntArray) -> IntArray:
    """[G]: how many rows of each group have the group's largest score."""
    largest = np.full(int(group.max(initial=-1)) + 1, -np.inf)
    np.maximum.at(largest, group, scores)
    return np.bincount(group[scores == largest[group]], minlength=len(largest))


def _kept(keep: IntArray, metrics: dict[str, Mean]) -> HostResult:
    return HostResult(columns=Batch({}, len(keep)), keep=keep, metrics={**metrics})
