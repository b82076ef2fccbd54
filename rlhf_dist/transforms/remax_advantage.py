"""ReMax advantages: a row against the greedy response to its prompt."""

from __future__ import annotations

import numpy as np

from rlhf_dist.algorithms.advantages.baselines import versus_baseline
from rlhf_dist.algorithms.kl import KlEstimator
from rlhf_dist.batch import Batch
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.transforms.columns import (
    mean_of,
    numbers,
    penalised_rewards,
    present_rows,
    row_advantages,
    row_metrics,
)
from rlhf_dist.transforms.reads import with_kl


@host_op(
    reads=with_kl("rewards", "baseline_rewards", "response_mask"),
    writes=("advantages", "response_mask"),
    scope="rows",
    missing=True,
)
def remax_advantage(
    batch: Batch, *, kl_coef: float = 0.0, kl_estimator: KlEstimator = "k1", kl_cap: float = 0.0
) -> HostResult:
    """rewards - baseline_rewards at every counted token, rewards less kl_coef * the KL estimate of the response (k1:
    log pi - log pi_ref). No token of a row counts any more whose reward, or whose baseline's, is missing."""
    baseline = numbers(batch, "baseline_rewards", missing=True)
    rewards, metrics = penalised_rewards(batch, kl_coef, kl_estimator, kl_cap)
    present = present_rows(rewards, baseline)
    advantages = np.zeros(batch.num_rows, dtype=np.float32)
    advantages[present] = versus_baseline(rewards[present], baseline[present])
    if len(present):
        metrics["baseline_reward"] = mean_of(baseline[present])
    return HostResult(
        columns=row_advantages(batch, advantages, present), metrics={**row_metrics(batch, present), **metrics}
    )
