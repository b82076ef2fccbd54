"""Group-relative advantages (GRPO): a row against the other responses to its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from rlhf_dist.algorithms.advantages.baselines import all_equal, group_relative
from rlhf_dist.algorithms.kl import KlEstimator
from rlhf_dist.batch import Batch
from rlhf_dist.dataflow.host import HostResult, Scope, host_op
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


def _scope(arguments: Mapping[str, Any]) -> Scope:
    return "batch" if arguments.get("scale_over") == "batch" else "groups"


@host_op(
    reads=with_kl("rewards", "group_id", "response_mask"),
    writes=("advantages", "response_mask"),
    scope=_scope,
    least_group=2,
    missing=True,
)
def grpo_advantage(
    batch: Batch,
    *,
    scale: bool = True,
    eps: float = 1e-6,
    ddof: Literal[0, 1] = 0,
    scale_over: Literal["group", "batch"] = "group",
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k1",
    kl_cap: float = 0.0,
) -> HostResult:
    """(reward - group mean) / (group std + eps) at every counted token; `scale=False` (Dr. GRPO) without the std.

    The std has divisor n - ddof, and is that of all rewards of the batch with `scale_over="batch"`. With a
    `kl_coef` the reward is less kl_coef * the KL estimate of the response. Groups whose rewards (before that) are all
    equal are counted: the rewards teach nothing there, and without a `kl_coef` their advantage is exactly 0. So are
    rows whose reward is missing: a group is the rows that have one, and no token of the others counts any more.
    """
    rewards, metrics = penalised_rewards(batch, kl_coef, kl_estimator, kl_cap)
    present = present_rows(rewards)
    group = groups(batch, present)
    equal = all_equal(numbers(batch, "rewards", missing=True)[present], group)
    relative = np.zeros(batch.num_rows, dtype=np.float32)
    relative[present] = group_relative(rewards[present], group, scale=scale, eps=eps, ddof=ddof, scale_over=scale_over)
    return HostResult(
        columns=row_advantages(batch, relative, present),
        metrics={**row_metrics(batch, present), **metrics, **group_metrics(equal, group)},
    )
