"""Advantages of the steps of a tree: a step is worth what came of it, the mean reward of the leaves below."""

from __future__ import annotations

from typing import Literal

import numpy as np

from rlhf_dist.algorithms.ragged import Float64Array, row_of_token
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.transforms.columns import mask_and_offsets, mean_of
from rlhf_dist.transforms.forest import TREE_COLUMNS, Forest, forest_of

Against = Literal["siblings", "parent", "prompt", "parent_and_prompt"]


@host_op(reads=TREE_COLUMNS, writes=("advantages", "response_mask"), scope="groups", missing=True)
def tree_advantage(
    batch: Batch,
    *,
    against: Against = "siblings",
    scale: bool = False,
    eps: float = 1e-6,
    leaf_power: float = 0.0,
    once: bool = True,
) -> HostResult:
    """Every token has the advantage of its segment s, the stretch between two forks, by V(s), the mean of its leaves:

    siblings            V(s) - mean of V over the segments of its fork; scale: / (their std + eps)   TreeRPO, 2506.05183
    parent              V(s) - V(what it follows on)
    prompt              V(s) - V(prompt), the mean over the group's trees; scale: / (std of the group's leaves + eps)
    parent_and_prompt   their sum, TreeRL's process reward (2506.11902) with leaf_power 0.5

    each divided by leaves(s) ** leaf_power. A group's trees part at the prompt. A segment that is alone at its fork has
    the advantage of what it follows on. once: a token that several rows share counts in the first of them alone.
    Leaves whose reward is missing count nowhere, nor do tokens without any other leaf below.
    """
    forest = forest_of(batch)
    advantage = _advantages(batch, forest, against, scale, eps)
    advantage = advantage / np.maximum(forest.leaves, 1) ** leaf_power
    mask, offsets = mask_and_offsets(batch)
    counts = forest.leaves[forest.of_token] > 0
    rows = row_of_token(offsets)
    if once:
        counts &= forest.first_row()[forest.of_token] == rows
    shared = float((forest.first_row()[forest.of_token] != rows)[mask > 0].sum())
    kept = (mask * counts).astype(mask.dtype)
    values = np.where(kept > 0, advantage[forest.of_token], 0.0).astype(np.float32)
    columns = Batch({"advantages": Column(values, offsets), "response_mask": Column(kept, offsets)}, batch.num_rows)
    return HostResult(columns=columns, metrics=_metrics(batch, forest, shared, float((mask > 0).sum())))


def _advantages(batch: Batch, forest: Forest, against: Against, scale: bool, eps: float) -> Float64Array:
    """[S] before they are divided by leaves."""
    alone = np.ones(len(forest.parent), dtype=bool)
    at_fork = np.zeros(len(forest.parent))
    for segments in forest.forks():
        values = forest.value[segments]
        alone[segments] = False
        if against == "siblings" and np.any(values != values[0]):
            at_fork[segments] = (values - values.mean()) / (values.std() + eps if scale else 1.0)
        elif against != "siblings":
            first = segments[0]
            above = forest.parent[first]
            at_fork[segments] = values - (
                forest.value[above] if above >= 0 else forest.prompt_value[forest.group[first]]
            )
    for segment in np.flatnonzero(alone):  # parents come before children
        above = forest.parent[segment]
        at_fork[segment] = at_fork[above] if above >= 0 else 0.0
    if against in ("siblings", "parent"):
        return at_fork if against == "siblings" or not scale else at_fork / (_spread(batch, forest) + eps)
    whole = forest.value - forest.prompt_value[forest.group]
    found = whole + (at_fork if against == "parent_and_prompt" else 0.0)
    return found / (_spread(batch, forest) + eps) if scale else found


def _spread(batch: Batch, forest: Forest) -> Float64Array:
    """[S] the standard deviation of the leaves' rewards in each segment's group."""
    rewards = batch["rewards"].values[forest.present].astype(np.float64)
    of_leaf = np.array([forest.group[forest.paths[row][-1]] for row in forest.present], dtype=np.int64)
    size = len(forest.prompt_value)
    count = np.maximum(np.bincount(of_leaf, minlength=size), 1)
    mean = np.bincount(of_leaf, weights=rewards, minlength=size) / count
    variance = np.bincount(of_leaf, weights=(rewards - mean[of_leaf]) ** 2, minlength=size) / count
    found: Float64Array = np.sqrt(variance)[forest.group]
    return found


def _metrics(batch: Batch, forest: Forest, shared: float, tokens: float) -> Metrics:
    forks = forest.forks()
    equal = [bool(np.all(forest.value[part] == forest.value[part[0]])) for part in forks]
    leaves = float((batch["leaf"].values > 0).sum())
    return {
        **({"reward": mean_of(batch["rewards"].values[forest.present])} if len(forest.present) else {}),
        "trees": Mean(float(len(np.unique(batch["tree"].values))), 0),
        "forks": Mean(float(len(forks)), 0),
        "equal_forks": Mean(float(sum(equal)), float(len(equal))),
        "missing_rewards": Mean(leaves - len(forest.present), 0),
        "shared_tokens": Mean(shared, tokens),
    }
