"""Between a judge's verdicts and the rows they are about: votes, pairs in both orders, lists of a whole group.

    pointwise   verdicts = judge.generate_sequences(batch, template=..., parser=Number(...), n=3)
                batch = verdict_means(batch, verdicts)
    pairwise    verdicts = judge.generate_sequences(both_orders(batch), template=..., parser=Choice({"A": 1, "B": 0}))
                batch = win_rates(batch, verdicts)
    listwise    verdicts = judge.generate_sequences(listed(batch), template=..., parser=Numbers("Scores:"))
                batch = list_scores(batch, verdicts)

A row without a verdict has a number that is missing, and 0 in the column `judged`: advantages and pairs leave it out,
and `judged, others = batch.where("judged")` parts it from the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_dist.batch import Batch, Column, IntArray
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import Mean, Metrics, Spread
from rlhf_dist.missing import MISSING
from rlhf_dist.transforms.columns import mean_of

Floats = npt.NDArray[np.float64]


def _votes_and(*own: str) -> Any:
    """Of the batch the row's id; of the verdicts these, what was parsed of them and whether it was."""
    return lambda settings: (("row_id",), (*own, settings["column"], "parsed"))


def _into(settings: Mapping[str, Any]) -> tuple[str, ...]:
    return (settings["into"], "judged")


@host_op(reads=_votes_and("parent_id"), writes=_into, scope="groups", missing=True)
def verdict_means(batch: Batch, verdicts: Batch, *, column: str = "score", into: str = "rewards") -> HostResult:
    """Each row's mean over the verdicts that were made of it and could be parsed."""
    rows = _rows_of(batch, verdicts["parent_id"].values)
    said = _said(verdicts, column) & (rows >= 0)
    rows, votes = rows[said], verdicts[column].values[said].astype(np.float64)
    total, count = _sums(rows, votes, batch.num_rows)
    apart = votes - (total / np.maximum(count, 1))[rows]
    return _judged(total, count, into, {"vote_variance": mean_of(np.square(apart))})


@host_op(
    reads=lambda settings: ("row_id", "group_id", settings["column"]),
    writes=lambda settings: (f"{settings['column']}_a", f"{settings['column']}_b", "row_a", "row_b"),
    scope="groups",
    rows="derive",
    least_group=2,
    copies=lambda settings: 2 * settings["rounds"],
)
def both_orders(batch: Batch, *, rounds: int = 1, column: str = "response") -> HostResult:
    """Two rows for each pair that is compared, one in each order, with the texts as `response_a` and `response_b`.

    Each row meets the `rounds` behind it in its group, in a circle: of two rows one pair, of n all of them with
    rounds = n // 2.
    """
    if rounds < 1:
        raise ValueError(f"both_orders needs rounds >= 1, got {rounds}")
    pairs = [
        pair
        for rows in batch.group()
        for pair in dict.fromkeys(
            tuple(sorted((int(rows[k]), int(rows[(k + apart) % len(rows)]))))
            for k in range(len(rows))
            for apart in range(1, rounds + 1)
            if apart % len(rows)
        )
    ]
    ordered = np.array([one for i, j in pairs for one in ((i, j), (j, i))], dtype=np.int64).reshape(-1, 2)
    first, second = ordered.T
    return HostResult(
        columns=Batch(
            {
                f"{column}_a": batch[column].take(first),
                f"{column}_b": batch[column].take(second),
                "row_a": Column(batch["row_id"].values[first]),
                "row_b": Column(batch["row_id"].values[second]),
            },
            len(ordered),
        ),
        parent=first,
        metrics={"pairs": Mean(float(len(pairs)), 0)},
    )


@host_op(reads=_votes_and("row_a", "row_b"), writes=_into, scope="groups", missing=True)
def win_rates(batch: Batch, verdicts: Batch, *, column: str = "choice", into: str = "rewards") -> HostResult:
    """How often each row wins its pairs, in [0, 1]: the mean over both orders, where a verdict is 1 if the first of the
    two is better, 0 if the second, and 0.5 for a tie. A pair counts where both orders have a verdict.

    `order_agreement`: share of the pairs in which both orders say the same. `first_wins`: mean verdict, 0.5 for a judge
    that does not care who stands first.
    """
    first, second = (_rows_of(batch, verdicts[name].values) for name in ("row_a", "row_b"))
    there = (first >= 0) & (second >= 0)
    said, votes = _said(verdicts, column)[there], verdicts[column].values[there].astype(np.float64)
    _check_unit(votes[said], column)
    ordered = np.stack([first[there], second[there]])
    pairs, pair_of = np.unique(np.sort(ordered, axis=0), axis=1, return_inverse=True)
    # [pairs, 2]: the lower row first in the text, and the higher; what was said of whoever stands first.
    place = 2 * pair_of.ravel() + (ordered[0] > ordered[1])
    total, count = _sums(place[said], votes[said], 2 * pairs.shape[1])
    judged = (count.reshape(-1, 2) > 0).all(axis=1)
    first_wins = (total / np.maximum(count, 1)).reshape(-1, 2)[judged]
    win: Floats = (first_wins[:, 0] + 1 - first_wins[:, 1]) / 2
    agree = np.sign(first_wins[:, 0] - 0.5) == np.sign(0.5 - first_wins[:, 1])
    low, high = pairs[:, judged]
    wins, played = _sums(np.concatenate([low, high]), np.concatenate([win, 1 - win]), batch.num_rows)
    metrics = {
        "pairs_judged": mean_of(np.asarray(judged)),
        "order_agreement": mean_of(np.asarray(agree)),
        "ties": mean_of(np.asarray(win == 0.5)),
        "first_wins": mean_of(first_wins.ravel()),
    }
    return _judged(wins, played, into, metrics)


@host_op(
    reads=lambda settings: ("row_id", "group_id", settings["column"]),
    writes=("listing", "listed_rows"),
    scope="batch",
    rows="derive",
    least_group=2,
)
def listed(
    batch: Batch, *, column: str = "response", heading: str = "Response {number}:", rng: np.random.Generator
) -> HostResult:
    """One row for each group, with the texts of all its rows as `listing`, in an order that is drawn."""
    parent, texts, ids = list[int](), list[str](), list[IntArray]()
    for rows in batch.group():
        order = rng.permutation(np.asarray(rows))
        said = [f"{heading.format(number=k)}\n{batch[column].row(int(row))}" for k, row in enumerate(order, start=1)]
        parent.append(int(rows[0]))
        texts.append("\n\n".join(said))
        ids.append(batch["row_id"].values[order])
    columns = {"listing": Column.strings(texts), "listed_rows": Column.ragged(ids, dtype=np.int64)}
    return HostResult(columns=Batch(columns, len(parent)), parent=np.array(parent, dtype=np.int64))


@host_op(reads=_votes_and("listed_rows"), writes=_into, scope="groups", missing=True)
def list_scores(batch: Batch, verdicts: Batch, *, column: str = "numbers", into: str = "rewards") -> HostResult:
    """Each row's mean score over the verdicts on its group that have as many numbers as the list has rows."""
    lists, numbers, parsed = verdicts["listed_rows"], verdicts[column], verdicts["parsed"].values > 0
    kept = np.flatnonzero(parsed & (lists.lengths == numbers.lengths))
    rows = _rows_of(batch, lists.take(kept).values)
    there = rows >= 0
    total, count = _sums(rows[there], numbers.take(kept).values[there].astype(np.float64), batch.num_rows)
    wrong = Mean(float(parsed.sum()) - len(kept), float(verdicts.num_rows))
    return _judged(total, count, into, {"wrong_length": wrong})


# --- rows and votes ----------------------------------------------------------------------------------------
def _said(verdicts: Batch, column: str) -> npt.NDArray[np.bool_]:
    """[V] whether a verdict could be parsed."""
    if verdicts[column].offsets is not None or verdicts[column].values.ndim != 1:
        raise ValueError(f"verdicts need one number a row in {column!r}; it has several, or text")
    said: npt.NDArray[np.bool_] = verdicts["parsed"].values > 0
    return said


def _rows_of(batch: Batch, ids: IntArray) -> IntArray:
    """The row of each id; -1 for one that is not there any more."""
    have = batch["row_id"].values
    if not len(have):
        return np.full(len(ids), -1, dtype=np.int64)
    order = np.argsort(have)
    at = np.searchsorted(have, ids, sorter=order).clip(0, len(have) - 1)
    return np.where(have[order[at]] == ids, order[at], -1).astype(np.int64)


def _sums(places: IntArray, values: Floats, size: int) -> tuple[Floats, Floats]:
    return np.bincount(places, values, size).astype(np.float64), np.bincount(places, minlength=size).astype(np.float64)


def _judged(total: Floats, count: Floats, into: str, metrics: Mapping[str, Mean]) -> HostResult:
    judged = count > 0
    values = np.divide(total, count, out=np.full_like(total, np.nan), where=judged)
    numbers = values.astype(np.float32)
    numbers[~judged] = MISSING
    columns = {into: Column(numbers), "judged": Column(judged.astype(np.uint8))}
    known: Metrics = {name: one for name, one in metrics.items() if one.count}  # a mean of nothing is not 0
    known["unjudged"] = mean_of(~judged)
    if judged.any():
        known |= {"verdict": mean_of(values[judged]), "verdict_std": Spread.of(values[judged])}
    return HostResult(columns=Batch(columns, len(judged)), metrics=known)


def _check_unit(votes: Floats, column: str) -> None:
    if len(votes) and not (0 <= votes.min() and votes.max() <= 1):
        raise ValueError(
            f"win_rates needs verdicts in [0, 1] (1: the first is better), got {votes.min():g} to {votes.max():g} in "
            f"{column!r}; give the parser such values: Choice({{'A': 1, 'B': 0, 'tie': 0.5}})"
        )
