"""Advantages without a critic, most one number for all tokens of a response: what recipes of this family choose from.

loo            r_i - mean of the other rewards of the group                                   RLOO, 2402.14740
group          (r_i - mean) / std of the group                                                GRPO, 2402.03300
group_mean     r_i - mean of the group                                                        Dr. GRPO, 2503.20783
batch          (R_t - mean) / std, both of all tokens of the batch,
               R_t = r_i - beta sum_{s >= t} log pi/pi_ref(y_s)                               REINFORCE++, 2501.03262
group_batch    the same with r_i - mean of the group                                          REINFORCE++-baseline
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
from rlhf_dist.algorithms.ragged import row_of_token, sum_rows
from rlhf_dist.batch import Batch, Column, IntArray
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.metrics import Mean
from rlhf_dist.transforms.columns import (
    group_metrics,
    groups,
    mask_and_offsets,
    numbers,
    penalty_and_metrics,
    present_rows,
    row_advantages,
    row_metrics,
    without_missing,
)
from rlhf_dist.transforms.reads import with_kl

Baseline = Literal[
    "loo", "group", "group_mean", "batch", "group_batch", "length", "wins", "pass_at_k", "shifted", "signed", "none"
]
EPS = 1e-6
OVER_TOKENS = ("batch", "group_batch")
"""Baselines of every token by itself."""


def _scope(arguments: Mapping[str, Any]) -> Literal["batch", "groups"]:
    return "batch" if arguments["baseline"] in OVER_TOKENS else "groups"


@host_op(
    reads=with_kl("rewards", "group_id", "response_mask"),
    writes=("advantages", "response_mask"),
    scope=_scope,
    least_group=lambda settings: 1 if settings["baseline"] in ("batch", "none", "signed") else 2,
    missing=True,
)
def response_advantage(
    batch: Batch, *, baseline: Baseline, kl_coef: float = 0.0, k: int = 4, shift: float = 0.0
) -> HostResult:
    """The advantage of the table above at every counted token. kl_coef: beta; where there is one number for a response,
    its reward is less kl_coef * log pi/pi_ref of the whole of it. k of pass_at_k, whose rewards above 1/2 are right, as
    signed's are; shift of shifted. A row whose reward is missing is in no baseline, and no token of it counts."""
    mask, offsets = mask_and_offsets(batch)
    penalty, metrics = penalty_and_metrics(batch, kl_coef, "k1", 0.0)
    given = numbers(batch, "rewards", missing=True)
    present = present_rows(given)
    group, rewards, lengths = groups(batch, present), given[present], sum_rows(mask > 0, offsets)[present]
    of = np.zeros(batch.num_rows, np.float32)
    if baseline in OVER_TOKENS:
        of[present] = advantages_of(rewards, group, lengths, "none" if baseline == "batch" else "group_mean")
        columns = of_batch(batch, of[row_of_token(offsets)] + from_here_on(penalty, offsets), present)
    else:
        rewards_less_kl = rewards + sum_rows(penalty, offsets)[present]
        of[present] = advantages_of(rewards_less_kl, group, lengths, baseline, k=k, shift=shift)
        columns = row_advantages(batch, of, present)
    equal = group_metrics(all_equal(rewards, group), group)
    return HostResult(columns=columns, metrics={**row_metrics(batch, present), **metrics, **equal})


def of_batch(batch: Batch, returns: Any, present: IntArray) -> Batch:
    """Returns [N] to mean 0 and deviation 1 over the batch's counted tokens, without those of rows not `present`."""
    mask = without_missing(batch, present)
    counted = np.flatnonzero(mask.values > 0)
    advantages = np.zeros(len(mask.values), np.float32)
    if len(counted):
        advantages[counted] = standardised(returns[counted])
    return Batch({"advantages": Column(advantages, mask.offsets), "response_mask": mask}, batch.num_rows)


def from_here_on(per_token: Any, offsets: IntArray) -> np.ndarray[Any, Any]:
    """[N] each token's number and those behind it in its row, added up."""
    before = np.concatenate([[0.0], np.cumsum(per_token, dtype=np.float64)])
    return before[offsets[1:]][row_of_token(offsets)] - before[:-1]


def advantages_of(
    rewards: Any, group: Any, lengths: Any, baseline: Baseline, *, k: int = 4, shift: float = 0.0
) -> np.ndarray[Any, Any]:
    """[B] of rewards, groups 0..G-1 and response lengths, [B] each. Raises ValueError for those of tokens."""
    if baseline in OVER_TOKENS:
        raise ValueError(f"baseline {baseline!r} is a number for each token; response_advantage has it")
    rewards = np.asarray(rewards, np.float64)
    if not len(rewards):
        return rewards
    if baseline == "loo":
        return leave_one_out(rewards.astype(np.float32), group)
    if baseline == "group":
        return group_relative(rewards.astype(np.float32), group, eps=EPS)
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
    return rewards - mean[group] - (shift if baseline == "shifted" else 0.0)


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
