"""Rows of single steps, made of the leaves of trees: pairs of siblings for preference losses, and steps with values.

leaf    prompt | 0 0 0 | 1 1 1        pairs     prompt 0 0 0 | 1 1 1   +1     the better of two that follow on 0 0 0
leaf    prompt | 0 0 0 | 2 2                    prompt 0 0 0 | 2 2     -1
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from rlhf_dist.algorithms.ragged import Float64Array
from rlhf_dist.batch import Batch, Column, IntArray
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.sampling import seed_of
from rlhf_dist.transforms.columns import mean_of
from rlhf_dist.transforms.forest import TREE_COLUMNS, Forest, forest_of

STEP_READS = (*TREE_COLUMNS, "prompt_ids", "response_ids", "rollout_log_probs")
STEP_WRITES = ("prompt_ids", "response_ids", "response_mask", "rollout_log_probs", "rewards", "leaves", "depth")


@host_op(
    reads=lambda settings: (*STEP_READS, *((settings["value"],) if settings.get("value") else ())),
    writes=(*STEP_WRITES, "label", "margin", "group_id"),
    scope="groups",
    rows="derive",
    copies=2,
    missing=True,
)
def tree_pairs(batch: Batch, *, least_gap: float = 0.0, value: str | None = None, share: float = 0.5) -> HostResult:
    """At every fork the best (label +1) and the worst (-1) of the steps that follow, as a pair of rows.

    A step is a segment: what was said and drawn up to the next fork; what came before is its prompt. Its value is the
    mean reward of its leaves, `rewards` of the rows; with `value`, a number a row, share * that + (1 - share) * its
    mean over the leaves (Agent Q mixes search and critic so). Forks whose values are not more than `least_gap` apart
    hold no pair and are counted. margin: the gap; `leaves` [B]: leaves below the step; `depth` [B]: steps before it.
    Each pair is a group of its own.
    """
    forest = forest_of(batch)
    values = _mixed(batch, forest, value, share)
    taken, labels, gaps, names = list[int](), list[int](), list[float](), list[int]()
    forks = forest.forks()
    for segments in forks:
        best, worst = segments[np.argmax(values[segments])], segments[np.argmin(values[segments])]
        gap = float(values[best] - values[worst])
        if gap > least_gap:
            taken += [int(best), int(worst)]
            labels += [1, -1]
            gaps += [gap, gap]
            names += [seed_of("pair", *forest.keys[best])] * 2
    columns, parent = _step_rows(batch, forest, np.array(taken, dtype=np.int64), values)
    columns |= {
        "label": Column(np.array(labels, dtype=np.int8)),
        "margin": Column(np.array(gaps, dtype=np.float32)),
        "group_id": Column(np.array(names, dtype=np.int64)),
    }
    metrics: Metrics = {
        "forks": Mean(float(len(forks)), 0),
        "pairs": Mean(len(taken) / 2, 0),
        "equal_forks": Mean(len(forks) - len(taken) / 2, float(len(forks))),
        **({"pair_margin": mean_of(np.array(gaps))} if gaps else {}),
    }
    return HostResult(columns=Batch(columns, len(taken)), parent=parent, metrics=metrics)


@host_op(
    reads=STEP_READS,
    writes=STEP_WRITES,
    scope="groups",
    rows="derive",
    copies=lambda settings: int(settings["most_steps"]),
    missing=True,
)
def tree_nodes(
    batch: Batch, *, backup: Literal["mean", "max"] = "mean", gamma: float = 1.0, most_steps: int = 2
) -> HostResult:
    """Every step of the trees as a row of its own, with its value as `rewards`: what a step's value model learns from.

    backup: the mean reward of its leaves, or Bellman's Q(s) = r(s) + gamma max Q(s'), r the reward of a leaf at its
    last step. Steps without any rewarded leaf below are left out.

    most_steps: most steps for each row, which plans count on: the depth of a search is always enough, 2 is where every
    fork has at least two branches with leaves. Raises ValueError where there are more.
    """
    forest = forest_of(batch)
    values = forest.value if backup == "mean" else _best_below(batch, forest, gamma)
    known = np.flatnonzero(forest.leaves > 0)
    if len(known) > most_steps * batch.num_rows:
        raise ValueError(
            f"tree_nodes makes at most {most_steps} steps for each row (most_steps), got {len(known)} of "
            f"{batch.num_rows} rows; set most_steps to the depth of the search"
        )
    columns, parent = _step_rows(batch, forest, known, values)
    metrics: Metrics = {"steps": Mean(float(len(known)), 0)}
    if len(known):
        metrics["step_value"] = mean_of(values[known])
    return HostResult(columns=Batch(columns, len(known)), parent=parent, metrics=metrics)


def _mixed(batch: Batch, forest: Forest, value: str | None, share: float) -> Float64Array:
    """[S] what steps are worth."""
    if value is None:
        return forest.value
    said, count = np.zeros_like(forest.value), np.zeros_like(forest.value)
    for row in forest.present:
        at = forest.paths[row][-1]
        while at >= 0:
            said[at] += float(batch[value].values[row])
            count[at] += 1
            at = int(forest.parent[at])
    mixed: Float64Array = share * forest.value + (1 - share) * said / np.maximum(count, 1)
    return mixed


def _best_below(batch: Batch, forest: Forest, gamma: float) -> Float64Array:
    """[S] Bellman's values from the leaves up."""
    found = np.full(len(forest.parent), -np.inf)
    for row in forest.present:
        end = forest.paths[row][-1]
        found[end] = max(found[end], float(batch["rewards"].values[row]))
    for segment in range(len(found) - 1, -1, -1):  # children come after parents
        above = forest.parent[segment]
        if above >= 0:
            found[above] = max(found[above], gamma * found[segment])
    return np.where(np.isfinite(found), found, 0.0)


def _step_rows(
    batch: Batch, forest: Forest, segments: IntArray, values: Float64Array
) -> tuple[dict[str, Column], IntArray]:
    """A row for each of the segments, and the rows they are made of."""
    rows = forest.first_row()[segments]
    made: Mapping[str, list[Any]] = {
        name: [] for name in ("prompt_ids", "response_ids", "response_mask", "rollout_log_probs")
    }
    depth = []
    offsets = batch["segment"].offsets
    assert offsets is not None, "it is ragged"
    for row, segment in zip(rows.tolist(), segments.tolist(), strict=True):
        inside = np.flatnonzero(forest.of_token[offsets[row] : offsets[row + 1]] == segment)
        first, last = int(inside[0]), int(inside[-1]) + 1
        ids = batch["response_ids"].row(row)
        made["prompt_ids"].append(np.concatenate([batch["prompt_ids"].row(row), ids[:first]]))
        for name in ("response_ids", "response_mask", "rollout_log_probs"):
            made[name].append(batch[name].row(row)[first:last])
        depth.append(_depth(forest, segment))
    columns = {name: Column.ragged(found, batch[name].values.dtype) for name, found in made.items()}
    columns |= {
        "rewards": Column(values[segments].astype(np.float32)),
        "leaves": Column(forest.leaves[segments].astype(np.float32)),
        "depth": Column(np.array(depth, dtype=np.float32)),
    }
    return columns, rows


def _depth(forest: Forest, segment: int) -> int:
    depth, at = 0, int(forest.parent[segment])
    while at >= 0:
        depth, at = depth + 1, int(forest.parent[at])
    return depth
