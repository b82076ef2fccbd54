"""Advantages without a critic, one number for all tokens of a response: what recipes of this family choose from.

loo            r_i - mean of the other rewards of the group                                   RLOO, 2402.14740
group          (r_i - mean) / std of the group                                                GRPO, 2402.03300
group_mean     r_i - mean of the group                                                        Dr. GRPO, 2503.20783
batch          (r_i - mean) / std, both of the whole batch                                    REINFORCE++, 2501.03262
group_batch    r_i - mean of the group, then (. - mean) / std of the batch                    REINFORCE++-baseline
length         r_i - sum_j |y_j| r_j / sum_j |y_j|, over the group                            OPO, 2505.23585
wins           mean_{j != i} [r_i > r_j] + [r_i = r_j] / 2, less 1/2                          SPO, 2401.04056
pass_at_k      with N responses, W of them wrong:  R = 1 - C(W, k) / C(N, k),  S = sqrt(R (1 - R))
               right: (1 - R) / S     wrong: (1 - R - C(W - 1, k - 1) / C(N - 1, k - 1)) / S  2508.10751
shifted        r_i - mean of the group - shift                                                AsymRE, 2506.20520
signed         1 where r_i > 1/2, else -1                                                     Reinforce-Rej, 2504.11343
"""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from typing import Any, Literal

import numpy as np

from rlhf_dist.algorithms.advantages.baselines import all_equal, group_relative, leave_one_out
from rlhf_dist.algorithms.ragged import sum_rows
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.metrics import Mean
from rlhf_dist.transforms.columns import (
    group_metrics,
    groups,
    mask_and_offsets,
    numbers,
    penalised_rewards,
    present_rows,
    row_advantages,
    row_metrics,
)
from rlhf_dist.transforms.reads import with_kl

Baseline = Literal[
    "loo", "group", "group_mean", "batch", "group_batch", "length", "wins", "pass_at_k", "shifted", "signed", "none"
]
EPS = 1e-6


def _scope(arguments: Mapping[str, Any]) -> Literal["batch", "groups"]:
    return "batch" if arguments["baseline"] in ("batch", "group_batch") else "groups"


@host_op(
    reads=with_kl("rewards", "group_id", "response_mask"),
    writes=("advantages", "response_mask"),
    scope=_scope,
    missing=True,
)
def response_advantage(
    batch: Batch, *, baseline: Baseline, kl_coef: float = 0.0, k: int = 4, shift: float = 0.0
) -> HostResult:
    """The advantage of the table above at every counted token. kl_coef: the reward is less kl_coef * log pi/pi_ref of
    the response. k of pass_at_k, whose rewards above 1/2 are right, as signed's are; shift of shifted. A row whose
    reward is missing is in no baseline, and no token of it counts."""
    mask, offsets = mask_and_offsets(batch)
    rewards, metrics = penalised_rewards(batch, kl_coef, "k1", 0.0)
    present = present_rows(rewards)
    group, lengths = groups(batch, present), sum_rows(mask > 0, offsets)[present]
    of = np.zeros(batch.num_rows, np.float32)
    of[present] = advantages_of(rewards[present], group, lengths, baseline, k=k, shift=shift)
    equal = all_equal(numbers(batch, "rewards", missing=True)[present], group)
    return HostResult(
        columns=row_advantages(batch, of, present),
        metrics={**row_metrics(batch, present), **metrics, **group_metrics(equal, group)},
    )


def advantages_of(
    rewards: Any, group: Any, lengths: Any, baseline: Baseline, *, k: int = 4, shift: float = 0.0
) -> np.ndarray[Any, Any]:
    """[B] of rewards, groups 0..G-1 and response lengths, [B] each."""
    rewards = np.asarray(rewards, np.float64)
    if not len(rewards):
        return rewards
    if baseline == "loo":
        return leave_one_out(rewards.astype(np.float32), group)
    if baseline == "group":
        return group_relative(rewards.astype(np.float32), group, eps=EPS)
    if baseline == "batch":
        return standardised(rewards)
    if baseline == "none":
        return rewards
    if baseline == "signed":
        return np.where(rewards > 0.5, 1.0, -1.0)
    if baseline == "wins":
        return np.concatenate([win_shares(rewards[group == one]) for one in range(group.max() + 1)])[
            np.argsort(np.argsort(group, kind="stable"), kind="stable")
        ]
    if baseline == "pass_at_k":
        found = np.zeros(len(rewards))
        for one in range(group.max() + 1):
            if (group == one).sum() >= k:  # else rewards are missing, and k draws cannot be had of it
                found[group == one] = pass_at_k(rewards[group == one] > 0.5, k)
        return found
    weights = np.maximum(lengths, 1e-9) if baseline == "length" else np.ones(len(rewards))
    mean = np.bincount(group, weights * rewards) / np.bincount(group, weights)
    centred = rewards - mean[group] - (shift if baseline == "shifted" else 0.0)
    return standardised(centred) if baseline == "group_batch" else centred


def standardised(values: Any) -> np.ndarray[Any, Any]:
    """To mean 0 and standard deviation 1; 0 where all are equal."""
    return (values - values.mean()) / (values.std() + EPS)


def win_shares(rewards: Any) -> np.ndarray[Any, Any]:
    """[n] share of the other responses that each one beats, a tie as a half, less 1/2; 0 for one alone."""
    above = (rewards[:, None] > rewards[None, :]) + 0.5 * (rewards[:, None] == rewards[None, :])
    return (above.sum(1) - 0.5) / max(len(rewards) - 1, 1) - 0.5 if len(rewards) > 1 else np.zeros(1)


def pass_at_k(right: Any, k: int) -> np.ndarray[Any, Any]:
    """[n] advantages of one group under the reward "one of k draws is right"; 0 where that is certain or impossible."""
    n, wrong = len(right), int((~right).sum())
    if not 1 <= k <= n:
        raise ValueError(f"pass_at_k needs 1 <= k <= responses to a prompt, got k = {k} and {n} responses")
    mean = 1 - comb(wrong, k) / comb(n, k)
    deviation = (mean * (1 - mean)) ** 0.5
    if deviation == 0:
        return np.zeros(n)
    lost = comb(wrong - 1, k - 1) / comb(n - 1, k - 1) if wrong else 0.0
    return np.where(right, 1 - mean, 1 - mean - lost) / deviation


@host_op(reads=("advantages", "entropy", "response_mask"), writes=("advantages",))
def with_entropy(batch: Batch, *, alpha: float, kappa: float) -> HostResult:
    """A_t + min(alpha H_t, |A_t| / kappa): uncertain tokens count for more, and no sign changes (2506.14758)."""
    mask, offsets = mask_and_offsets(batch)
    advantages, entropy = numbers(batch, "advantages"), numbers(batch, "entropy")
    bonus = np.minimum(alpha * entropy, np.abs(advantages) / kappa) * (mask > 0)
    column = Column((advantages + bonus).astype(np.float32), offsets)
    return HostResult(
        columns=Batch({"advantages": column}), metrics={"entropy_bonus": Mean(float(bonus.sum()), float(mask.sum()))}
    )
