"""Rows made of rows: what becomes of a hint, a critique, a prefix is known from what was generated from it.

answers = frozen.generate_sequences(hints, n=4)              four rows of each hint
hints = mean_of_children(hints, reward.compute_reward(answers))
verdicts = group_by_parent(judge.generate_sequences(batch, template=..., n=4))     four verdicts on one response
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.missing import MISSING
from rlhf_dist.transforms.columns import mean_of, numbers, present_rows


def _reads(settings: Mapping[str, Any]) -> Any:
    return ("row_id", "group_id"), ("parent_id", "group_id", settings["column"])


@host_op(reads=_reads, writes=lambda settings: (settings["into"],), scope="groups", missing=True)
def mean_of_children(batch: Batch, children: Batch, *, column: str = "rewards", into: str = "rewards") -> HostResult:
    """`into` [B]: each row's mean of `column` over the rows of `children` that were made of it.

    Missing numbers are left out; a row without any other is missing itself, and counted (`childless`).
    """
    said = numbers(children, column, missing=True)
    present = present_rows(said)
    at = {int(row): place for place, row in enumerate(batch["row_id"].values)}
    places = np.array([at.get(int(parent), -1) for parent in children["parent_id"].values[present]], np.int64)
    known = places >= 0
    total = np.bincount(places[known], said[present][known].astype(np.float64), minlength=batch.num_rows)
    count = np.bincount(places[known], minlength=batch.num_rows)
    means = np.full(batch.num_rows, MISSING, np.float32)
    means[count > 0] = (total[count > 0] / count[count > 0]).astype(np.float32)
    metrics: Metrics = {"childless": Mean(float((count == 0).sum()), 0)}
    if count.any():
        metrics[into.removesuffix("s")] = mean_of(means[count > 0])
    return HostResult(columns=Batch({into: Column(means)}, batch.num_rows), metrics=metrics)


@host_op(reads=("parent_id",), writes=("group_id",))
def group_by_parent(batch: Batch) -> Batch:
    """The rows that were made of one row are a group: baselines compare verdicts on one response, not on one prompt."""
    return Batch({"group_id": Column(batch["parent_id"].values.astype(np.int64))}, batch.num_rows)
