"""ReMax advantages: a row against the greedy response to its prompt."""

from __future__ import annotations

from rlhf_dist.algorithms.advantages.baselines import versus_baseline
from rlhf_dist.algorithms.kl import KlEstimator
from rlhf_dist.algorithms.ragged import spread
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.transforms.columns import mask_and_offsets, mean_of, numbers, penalised_rewards
from rlhf_dist.transforms.reads import with_kl


@host_op(reads=with_kl("rewards", "baseline_rewards", "response_mask"), writes=("advantages",), scope="rows")
def remax_advantage(
    batch: Batch, *, kl_coef: float = 0.0, kl_estimator: KlEstimator = "k1", kl_cap: float = 0.0
) -> HostResult:
    """rewards - baseline_rewards at every counted token, rewards less kl_coef * the KL estimate of the response (k1:
    log pi - log pi_ref)."""
    mask, offsets = mask_and_offsets(batch)
    baseline = numbers(batch, "baseline_rewards")
    rewards, metrics = penalised_rewards(batch, kl_coef, kl_estimator, kl_cap)
    advantage = versus_baseline(rewards, baseline)
    return HostResult(
        columns=Batch({"advantages": Column(spread(advantage, offsets, mask), offsets)}, batch.num_rows),
        metrics={
            "reward": mean_of(batch["rewards"].values),
            "baseline_reward": mean_of(baseline),
            **metrics,
        },
    )
