"""Leave-one-out advantages (RLOO): a row against the mean of the *other* responses to its prompt."""

from __future__ import annotations

import numpy as np

from rlhf_dist.algorithms.advantages.baselines import all_equal, leave_one_out
from rlhf_dist.algorithms.kl import KlEstimator
from rlhf_dist.batch import Batch
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.transforms.columns import (
    group_metrics,
    groups,
    numbers,
    penalised_rewards,
    present_rows,
    row_advantages,
    row_metrics,
)
from rlhf_dist.transforms.reads import with_kl


@host_op(
    reads=with_kl("rewards", "group_id", "response_mask"),
    writes=("advantages", "response_mask"),
    scope="groups",
    least_group=2,
    missing=True,
)
def rloo_advantage(
    batch: Batch, *, kl_coef: float = 0.0, kl_estimator: KlEstimator = "k1", kl_cap: float = 0.0
) -> HostResult:
    """r - mean of the other rewards of the group, r less kl_coef * the KL estimate of the response (k1: its log-ratio).

    Groups whose rewards (before that) are all equal are counted; without a `kl_coef` their advantage is exactly 0.
    So are rows whose reward is missing: a group is the rows that have one, and no token of the others counts any more.
    """
    rewards, metrics = penalised_rewards(batch, kl_coef, kl_estimator, kl_cap)
    present = present_rows(rewards)
    group = groups(batch, present)
    advantages = np.zeros(batch.num_rows, dtype=np.float32)
    advantages[present] = leave_one_out(rewards[present], group)
    equal = all_equal(numbers(batch, "rewards", missing=True)[present], group)
    return HostResult(
        columns=row_advantages(batch, advantages, present),
        metrics={**row_metrics(batch, present), **metrics, **group_metrics(equal, group)},
    )
