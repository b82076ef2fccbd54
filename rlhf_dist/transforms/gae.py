"""Advantages and returns from a critic, with the KL penalty in the reward (PPO)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from rlhf_dist.algorithms.advantages.gae import gae as gae_formula
from rlhf_dist.algorithms.kl import KlEstimator
from rlhf_dist.algorithms.shaping import place_terminal
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import ExplainedVariance, Metrics
from rlhf_dist.missing import is_missing
from rlhf_dist.transforms.columns import (
    mask_and_offsets,
    mean_of,
    numbers,
    penalty_and_metrics,
    present_rows,
    row_metrics,
    tokens,
    without_missing,
)
from rlhf_dist.transforms.reads import with_kl


def _reads(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    base = with_kl("rewards", "values", "response_mask")(arguments)
    return (*base, "token_rewards") if arguments.get("dense", False) else base


@host_op(reads=_reads, writes=("advantages", "returns", "response_mask"), scope="rows", missing=True)
def gae(
    batch: Batch,
    *,
    gamma: float,
    lam: float,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k1",
    kl_cap: float = 0.0,
    dense: bool | Literal["alone"] = False,
) -> HostResult:
    """Generalised advantage estimation over the counted tokens of each row.

    The reward after token t is -kl_coef * the KL estimate (k1: old_log_probs - ref_log_probs), plus `rewards` at the
    row's last counted token, plus `token_rewards` when `dense`; `dense="alone"` is for rewards of turns, which
    `rewards` is the sum of and not put at the end once more. Rows without a counted token are left without advantages,
    and counted; so are rows whose reward is missing, and none of their tokens counts any more. Raises ValueError where
    a column holds NaN or infinity.
    """
    _, offsets = mask_and_offsets(batch)
    given, values = numbers(batch, "rewards", missing=True), tokens(batch, "values")
    present = present_rows(given)
    known = without_missing(batch, present)
    mask, rewards = known.values, np.where(is_missing(given), np.float32(0), given)
    counted = mask > 0
    terminal = np.zeros_like(rewards) if dense == "alone" else rewards
    token_rewards = place_terminal(terminal, offsets, mask)
    penalty, kl_metrics = penalty_and_metrics(batch, kl_coef, kl_estimator, kl_cap)
    token_rewards += penalty
    if dense:
        token_rewards += tokens(batch, "token_rewards")
    advantages, returns = gae_formula(token_rewards, values, offsets, mask, gamma, lam)
    metrics: Metrics = {
        **kl_metrics,
        **row_metrics(batch, present),
        "advantage": mean_of(advantages[counted]),
        "return": mean_of(returns[counted]),
        "value_before": mean_of(values[counted]),
        "explained_variance": ExplainedVariance.of(values[counted], returns[counted]),
    }
    columns = {"advantages": Column(advantages, offsets), "returns": Column(returns, offsets), "response_mask": known}
    return HostResult(columns=Batch(columns, batch.num_rows), metrics=metrics)
