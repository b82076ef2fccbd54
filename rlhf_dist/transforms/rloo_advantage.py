"""Leave-one-out advantages (RLOO): a row against the mean of the *other* responses to its prompt."""

from __future__ import annotations

from rlhf_dist.algorithms.advantages.baselines import all_equal, leave_one_out
from rlhf_dist.algorithms.ragged import spread
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import Mean
from rlhf_dist.transforms.columns import groups, mask_and_offsets, penalised_rewards
from rlhf_dist.transforms.reads import with_kl


@host_op(reads=with_kl("rewards", "group_id", "response_mask"), writes=("advantages",), scope="groups")
def rloo_advantage(batch: Batch, *, kl_coef: float = 0.0) -> HostResult:
    """r - mean of the other rewards of the group, r less kl_coef * (log pi - log pi_ref) of the response.

    Groups whose rewards are all equal (a group of one is) get 0 and are counted.
    """
    mask, offsets = mask_and_offsets(batch)
    rewards, group = penalised_rewards(batch, kl_coef), groups(batch)
    advantages = spread(leave_one_out(rewards, group), offsets, mask)
    equal = all_equal(rewards, group)
    return HostResult(
        columns=Batch({"advantages": Column(advantages, offsets)}, batch.num_rows),
        metrics={
            "reward": Mean(float(batch["rewards"].values.sum(dtype="float64")), batch.num_rows),
            "groups": Mean(float(len(equal)), 0),
            "groups_all_equal": Mean(float(equal.sum()), 0),
        },
    )
