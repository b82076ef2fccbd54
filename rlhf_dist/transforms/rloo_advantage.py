"""Leave-one-out advantages (RLOO): a row against the mean of the *other* responses to its prompt."""

from __future__ import annotations

from rlhf_dist.algorithms.advantages.baselines import all_equal, leave_one_out
from rlhf_dist.algorithms.kl import KlEstimator
from rlhf_dist.algorithms.ragged import spread
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.transforms.columns import group_metrics, groups, mask_and_offsets, mean_of, numbers, penalised_rewards
from rlhf_dist.transforms.reads import with_kl


@host_op(reads=with_kl("rewards", "group_id", "response_mask"), writes=("advantages",), scope="groups", least_group=2)
def rloo_advantage(
    batch: Batch, *, kl_coef: float = 0.0, kl_estimator: KlEstimator = "k1", kl_cap: float = 0.0
) -> HostResult:
    """r - mean of the other rewards of the group, r less kl_coef * the KL estimate of the response (k1: its log-ratio).

    Groups whose rewards (before that) are all equal are counted; without a `kl_coef` their advantage is exactly 0.
    """
    mask, offsets = mask_and_offsets(batch)
    group = groups(batch)
    rewards, metrics = penalised_rewards(batch, kl_coef, kl_estimator, kl_cap)
    advantages = spread(leave_one_out(rewards, group), offsets, mask)
    equal = all_equal(numbers(batch, "rewards"), group)
    return HostResult(
        columns=Batch({"advantages": Column(advantages, offsets)}, batch.num_rows),
        metrics={"reward": mean_of(batch["rewards"].values), **metrics, **group_metrics(equal)},
    )
