"""Group-relative advantages (GRPO): a row against the other responses to its prompt."""

from __future__ import annotations

from rlhf_dist.algorithms.advantages.baselines import all_equal, group_relative
from rlhf_dist.algorithms.ragged import spread
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import Mean
from rlhf_dist.transforms.columns import groups, mask_and_offsets, numbers


@host_op(reads=("rewards", "group_id", "response_mask"), writes=("advantages",), scope="groups")
def grpo_advantage(batch: Batch, *, scale: bool = True, eps: float = 1e-6) -> HostResult:
    """(reward - group mean) / (group std + eps) at every counted token; `scale=False` (Dr. GRPO) without the std.

    Groups whose rewards are all equal get 0 and are counted: they teach nothing.
    """
    mask, offsets = mask_and_offsets(batch)
    rewards, group = numbers(batch, "rewards"), groups(batch)
    advantages = spread(group_relative(rewards, group, scale=scale, eps=eps), offsets, mask)
    equal = all_equal(rewards, group)
    return HostResult(
        columns=Batch({"advantages": Column(advantages, offsets)}, batch.num_rows),
        metrics={
            "reward": Mean(float(rewards.sum(dtype="float64")), batch.num_rows),
            "groups": Mean(float(len(equal)), 0),
            "groups_all_equal": Mean(float(equal.sum()), 0),
        },
    )
