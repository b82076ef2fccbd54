"""Advantages and returns from a critic, with the KL penalty in the reward (PPO)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_dist.algorithms.advantages.gae import gae as gae_formula
from rlhf_dist.algorithms.kl import KlEstimator
from rlhf_dist.algorithms.ragged import last_counted
from rlhf_dist.algorithms.shaping import place_terminal
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import ExplainedVariance, Mean, Metric
from rlhf_dist.transforms.columns import mask_and_offsets, mean_of, numbers, penalty_and_metrics, tokens
from rlhf_dist.transforms.reads import with_kl


def _reads(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    base = with_kl("rewards", "values", "response_mask")(arguments)
    return (*base, "token_rewards") if arguments.get("dense", False) else base


@host_op(reads=_reads, writes=("advantages", "returns"), scope="rows")
def gae(
    batch: Batch,
    *,
    gamma: float,
    lam: float,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k1",
    kl_cap: float = 0.0,
    dense: bool = False,
) -> HostResult:
    """Generalised advantage estimation over the counted tokens of each row.

    The reward after token t is -kl_coef * the KL estimate (k1: old_log_probs - ref_log_probs), plus `rewards` at the
    row's last counted token, plus `token_rewards` when `dense`. Rows without a counted token are left without
    advantages, and counted. Raises ValueError where a column holds NaN or infinity.
    """
    mask, offsets = mask_and_offsets(batch)
    counted = mask > 0
    rewards, values = numbers(batch, "rewards"), tokens(batch, "values")
    token_rewards = place_terminal(rewards, offsets, mask)
    penalty, kl_metrics = penalty_and_metrics(batch, kl_coef, kl_estimator, kl_cap)
    token_rewards += penalty
    if dense:
        token_rewards += tokens(batch, "token_rewards")
    advantages, returns = gae_formula(token_rewards, values, offsets, mask, gamma, lam)
    metrics: dict[str, Metric] = {
        **kl_metrics,
        "reward": mean_of(rewards),
        "advantage": mean_of(advantages[counted]),
        "return": mean_of(returns[counted]),
        "value_before": mean_of(values[counted]),
        "explained_variance": ExplainedVariance.of(values[counted], returns[counted]),
        "rows_without_tokens": Mean(float((last_counted(offsets, mask) < 0).sum()), 0),
    }
    columns = {"advantages": Column(advantages, offsets), "returns": Column(returns, offsets)}
    return HostResult(columns=Batch(columns, batch.num_rows), metrics=metrics)
