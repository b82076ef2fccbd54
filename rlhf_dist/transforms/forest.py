"""The trees that rows are leaves of: segments between two forks, what each follows on, and what its leaves got.

    prompt ─┬─ segment 0 ─┬─ segment 1        row "0"       a group's trees begin at one prompt; a segment is there
            │             └─ segment 2        row "1"       once, however many rows have its tokens
            └─ segment 0 (another tree)

A context that was closed (`leaf` 0) is followed by the first segment of the context after it, so that the leaves below
a segment are all that came of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlhf_dist.algorithms.ragged import Float64Array
from rlhf_dist.batch import Batch, IntArray
from rlhf_dist.transforms.columns import groups, numbers, present_rows

TREE_COLUMNS = ("rewards", "group_id", "response_mask", "tree", "branch", "leaf", "segment")
"""What the ops on trees read."""
Key = tuple[int, int]
"""(tree, segment)."""


@dataclass(frozen=True, eq=False)
class Forest:
    """All segments of a batch, S of them, parents before children."""

    keys: list[Key]
    """[S] what each segment is called, wherever rows are cut."""
    of_token: IntArray
    """[N] the segment of each response token."""
    paths: list[list[int]]
    """[B] the segments of each row's own context, in order."""
    parent: IntArray
    """[S]; -1 for what follows on the prompt."""
    group: IntArray
    """[S] in 0..G-1."""
    leaves: IntArray
    """[S] rows with a reward below it; 0: nothing is known of it."""
    value: Float64Array
    """[S] mean reward of those; 0 where there are none."""
    prompt_value: Float64Array
    """[G] of each prompt: the mean of its trees, each of which is the mean of its leaves."""
    present: IntArray
    """Leaves with a reward, as rows."""

    @property
    def fork(self) -> IntArray:
        """[S] what each segment is compared at: its parent, the prompt (-1 - group) where it has none."""
        return np.where(self.parent >= 0, self.parent, -1 - self.group)

    def forks(self) -> list[IntArray]:
        """Segments that follow on the same one, two at least with leaves, for each fork."""
        known = np.flatnonzero(self.leaves > 0)
        order = known[np.argsort(self.fork[known], kind="stable")]
        cut = np.flatnonzero(np.diff(self.fork[order])) + 1
        return [part for part in np.split(order, cut) if len(part) > 1]

    def first_row(self) -> IntArray:
        """[S] the first row that has the segment."""
        found = np.full(len(self.parent), -1)
        for row in reversed(range(len(self.paths))):
            found[self.paths[row]] = row
        return found


def forest_of(batch: Batch) -> Forest:
    """The forest of rows with `TREE_COLUMNS`. Raises ValueError where the context that a row follows on is none
    of them."""
    rewards, group_of_row = numbers(batch, "rewards", missing=True), groups(batch)
    trees, leaf = batch["tree"].values, batch["leaf"].values > 0
    numbering: dict[Key, int] = {}
    parent: list[int] = []
    group: list[int] = []
    places = [_place(text) for text in batch["branch"].rows()]
    closed = {(int(trees[row]), *places[row]): row for row in range(batch.num_rows) if not leaf[row]}
    order = sorted(range(batch.num_rows), key=lambda row: places[row][1])  # contexts before those that follow on them
    of_row: dict[int, list[int]] = {}
    tokens: dict[int, npt.NDArray[np.int64]] = {}
    for row in order:
        tree, segments = int(trees[row]), batch["segment"].row(row)
        own, first = np.unique(segments, return_index=True)
        before = _row_before(tree, places[row], closed)
        last = -1 if before is None else of_row[before][-1]
        path = []
        for segment in own[np.argsort(first)].tolist():
            key = (tree, segment)
            if key not in numbering:
                numbering[key] = len(parent)
                parent.append(last)
                group.append(int(group_of_row[row]))
            last = numbering[key]
            path.append(last)
        of_row[row] = path
        tokens[row] = np.array([numbering[tree, segment] for segment in segments.tolist()], dtype=np.int64)
    paths = [of_row[row] for row in range(batch.num_rows)]
    ends = [row for row in present_rows(rewards).tolist() if leaf[row] and paths[row]]
    up = np.array(parent, dtype=np.int64)
    leaves, total = _added_up(up, [paths[row][-1] for row in ends], rewards[ends])
    flat = [tokens[row] for row in range(batch.num_rows)]
    return Forest(
        keys=list(numbering),
        of_token=np.concatenate(flat) if flat else np.empty(0, np.int64),
        paths=paths,
        parent=up,
        group=np.array(group, dtype=np.int64),
        leaves=leaves,
        value=total / np.maximum(leaves, 1),
        prompt_value=_prompt_values(
            trees[ends], group_of_row[ends], rewards[ends], int(group_of_row.max(initial=-1)) + 1
        ),
        present=np.array(ends, dtype=np.int64),
    )


def _place(text: str) -> tuple[tuple[int, ...], int]:
    """Path and number of the context of a `branch`."""
    path, _, context = text.partition(".")
    return tuple(int(part) for part in path.split("/") if part), int(context or 0)


def _row_before(
    tree: int, place: tuple[tuple[int, ...], int], closed: dict[tuple[int, tuple[int, ...], int], int]
) -> int | None:
    """The row of the context that this one follows on: closed in this branch or in one above it; None for the first.

    Raises ValueError where it is missing.
    """
    path, context = place
    if context == 0:
        return None
    for length in range(len(path), -1, -1):
        row = closed.get((tree, path[:length], context - 1))
        if row is not None:
            return row
    raise ValueError(
        f"the context that a row follows on must be among the rows, and tree {tree} has none {context - 1} for branch "
        f"{'/'.join(map(str, path)) + '.' + str(context)!r}; keep rows with leaf 0 with those of their group"
    )


def _added_up(parent: IntArray, ends: list[int], rewards: npt.NDArray[np.float32]) -> tuple[IntArray, Float64Array]:
    """[S] how many leaves there are below each segment, and the sum of their rewards."""
    count, total = np.zeros(len(parent), dtype=np.int64), np.zeros(len(parent), dtype=np.float64)
    for end, reward in zip(ends, rewards.tolist(), strict=True):
        at = end
        while at >= 0:
            count[at] += 1
            total[at] += reward
            at = int(parent[at])
    return count, total


def _prompt_values(
    trees: npt.NDArray[np.int64], group: IntArray, rewards: npt.NDArray[np.float32], size: int
) -> Float64Array:
    """[G]; 0 for a group without any leaf."""
    names, of_leaf = np.unique(trees, return_inverse=True)
    count = np.bincount(of_leaf, minlength=len(names))
    mean = np.bincount(of_leaf, weights=rewards.astype(np.float64), minlength=len(names)) / np.maximum(count, 1)
    its_group = np.zeros(len(names), dtype=np.int64)
    its_group[of_leaf] = group
    in_group = np.bincount(its_group, minlength=size)
    found: Float64Array = np.bincount(its_group, weights=mean, minlength=size) / np.maximum(in_group, 1)
    return found
