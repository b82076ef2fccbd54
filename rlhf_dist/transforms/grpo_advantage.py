"""Group-relative advantages (GRPO): a row against the other responses to its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from rlhf_dist.algorithms.advantages.baselines import all_equal, group_relative
from rlhf_dist.algorithms.kl import KlEstimator
from rlhf_dist.algorithms.ragged import spread
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult, Scope, host_op
from rlhf_dist.transforms.columns import group_metrics, groups, mask_and_offsets, mean_of, numbers, penalised_rewards
from rlhf_dist.transforms.reads import with_kl


def _scope(arguments: Mapping[str, Any]) -> Scope:
    return "batch" if arguments.get("scale_over") == "batch" else "groups"


@host_op(reads=with_kl("rewards", "group_id", "response_mask"), writes=("advantages",), scope=_scope, least_group=2)
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
    equal are counted: the rewards teach nothing there, and without a `kl_coef` their advantage is exactly 0.
    """
    mask, offsets = mask_and_offsets(batch)
    group = groups(batch)
    rewards, metrics = penalised_rewards(batch, kl_coef, kl_estimator, kl_cap)
    equal = all_equal(numbers(batch, "rewards"), group)
    relative = group_relative(rewards, group, scale=scale, eps=eps, ddof=ddof, scale_over=scale_over)
    return HostResult(
        columns=Batch({"advantages": Column(spread(relative, offsets, mask), offsets)}, batch.num_rows),
        metrics={"reward": mean_of(batch["rewards"].values), **metrics, **group_metrics(equal)},
    )
