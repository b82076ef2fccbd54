"""Rewards before advantages, each op a link of a chain: combined, against a reference, cut, brought to one scale.

A missing reward stays missing through every one, and enters no mean and no deviation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from rlhf_dist.algorithms import shaping
from rlhf_dist.algorithms.advantages.baselines import group_relative
from rlhf_dist.algorithms.advantages.whiten import whiten
from rlhf_dist.algorithms.ragged import FloatArray
from rlhf_dist.batch import Batch, Column, IntArray
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import Mean
from rlhf_dist.missing import MISSING
from rlhf_dist.transforms.columns import groups, mean_of, numbers, present_rows


def _scores(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(arguments.get("scores", ()))


@host_op(reads=_scores, writes=("rewards",), scope="rows", missing=True)
def combine_rewards(
    batch: Batch,
    *,
    scores: Sequence[str],
    how: shaping.Combine = "mean",
    coef: float = 0.0,
    weights: Sequence[float] = (),
) -> HostResult:
    """`rewards` of several columns of scores [B] (`reward.compute_reward(batch, out="helpful")` writes one): `how` and
    its `coef` and `weights` are those of `algorithms.shaping.combined`. Missing where one of the scores is.

    `score_variance`: mean over rows of the variance of their scores. Raises ValueError without scores.
    """
    if not scores:
        raise ValueError('combine_rewards needs the columns to combine: scores=("helpful", "harmless")')
    columns = [numbers(batch, name, missing=True) for name in scores]
    present = present_rows(*columns)
    known = np.stack(columns)[:, present]
    return HostResult(
        columns=_rewards(batch, present, shaping.combined(known, how, coef, weights)),
        metrics={"score_variance": mean_of(known.astype(np.float64).var(0)), "missing_rewards": _lost(batch, present)},
    )


@host_op(reads=("rewards", "reference_rewards"), writes=("rewards",), scope="rows", missing=True)
def rewards_against_reference(
    batch: Batch, *, shape: Literal["delta", "sigmoid", "log_sigmoid"] = "sigmoid", scale: float = 1.0
) -> HostResult:
    """`rewards` against `reference_rewards` [B], those of a reference answer to the row's prompt: their difference, its
    sigmoid (PAR, arXiv 2502.18770) or log-sigmoid (arXiv 2402.00742). Missing where either is.

    `better_than_reference`: share of rows.
    """
    rewards = numbers(batch, "rewards", missing=True)
    reference = numbers(batch, "reference_rewards", missing=True)
    present = present_rows(rewards, reference)
    shaped = shaping.against_reference(rewards[present], reference[present], shape, scale)
    return HostResult(
        columns=_rewards(batch, present, shaped),
        metrics={
            "better_than_reference": mean_of(rewards[present] > reference[present]),
            "missing_rewards": _lost(batch, present),
        },
    )


@host_op(reads=("rewards",), writes=("rewards",), scope="rows", missing=True)
def clip_rewards(batch: Batch, *, low: float, high: float) -> HostResult:
    """`rewards` cut to [low, high], reward units. Raises ValueError if low > high."""
    rewards = numbers(batch, "rewards", missing=True)
    present = present_rows(rewards)
    cut = shaping.clipped(rewards[present], low, high)
    share = Mean(float((cut != rewards[present]).sum()), float(len(present)))
    return HostResult(columns=_rewards(batch, present, cut), metrics={"clipped_rewards": share})


@host_op(reads=("rewards", "response_mask"), writes=("rewards",), scope="rows", missing=True)
def penalise_overlong(batch: Batch, *, longest: int, slack: float, coef: float = 1.0) -> HostResult:
    """`rewards` less up to `coef` for the last `slack * longest` tokens before `longest`: DAPO's soft overlong
    punishment (arXiv 2503.14476, eq. 13). An empty response costs nothing. `overlong`: mean of what was taken off."""
    rewards = numbers(batch, "rewards", missing=True)
    present = present_rows(rewards)
    penalty = coef * shaping.overlong_penalty(batch["response_mask"].lengths[present], longest, slack)
    return HostResult(
        columns=_rewards(batch, present, rewards[present] + penalty), metrics={"overlong": mean_of(-penalty)}
    )


@host_op(reads=("rewards",), writes=("rewards",), scope="batch", missing=True)
def whiten_rewards(batch: Batch, *, centre: bool = False, eps: float = 1e-8, ddof: Literal[0, 1] = 0) -> Batch:
    """`rewards` with standard deviation 1 over the rows of the batch; the mean stays unless `centre`.

    Rewards that are all equal stay as they are, or become 0 with `centre`.
    """
    rewards = numbers(batch, "rewards", missing=True)
    present = present_rows(rewards)
    whitened = whiten(rewards[present], np.ones(len(present)), centre=centre, eps=eps, ddof=ddof)
    return _rewards(batch, present, whitened)


@host_op(reads=("rewards", "group_id"), writes=("rewards",), scope="groups", least_group=2, missing=True)
def whiten_rewards_by_prompt(batch: Batch, *, scale: bool = True, eps: float = 1e-6, ddof: Literal[0, 1] = 0) -> Batch:
    """(reward - mean) / (deviation + eps) over the rows of each prompt; without `scale`, less the mean alone. 0 where
    they are all equal, and for a row that is alone."""
    rewards = numbers(batch, "rewards", missing=True)
    present = present_rows(rewards)
    relative = group_relative(rewards[present], groups(batch, present), scale=scale, eps=eps, ddof=ddof)
    return _rewards(batch, present, relative)


def _rewards(batch: Batch, present: IntArray, rewards: FloatArray) -> Batch:
    """The column: `rewards` in the rows that have one, missing in all others."""
    column = np.full(batch.num_rows, MISSING, dtype=np.float32)
    column[present] = rewards
    return Batch({"rewards": Column(column)}, batch.num_rows)


def _lost(batch: Batch, present: IntArray) -> Mean:
    return Mean(float(batch.num_rows - len(present)), 0)
