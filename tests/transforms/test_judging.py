"""Verdicts on rows: votes, both orders, lists; by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import as_result
from rlhf_dist.missing import is_missing
from rlhf_dist.transforms import both_orders, list_scores, listed, verdict_means, win_rates

NAN = float("nan")


def rows(groups: list[int]) -> Batch:
    """Rows with ids 10, 11, ... and texts a, b, ..."""
    count = len(groups)
    return Batch.of(
        row_id=np.arange(10, 10 + count),
        group_id=np.array(groups),
        response=[chr(ord("a") + k) for k in range(count)],
    )


def duels(of: list[tuple[int, int, float]]) -> Batch:
    first, second, votes = zip(*of, strict=True)
    said = np.array(votes, np.float32)
    return Batch.of(
        row_a=np.array(first), row_b=np.array(second), choice=said, parsed=np.isfinite(said).astype(np.uint8)
    )


def test_votes_that_could_be_parsed_are_averaged_and_a_row_without_one_is_nan_and_marked() -> None:
    verdicts = Batch.of(
        parent_id=np.array([10, 10, 10, 12, 12, 99]),
        score=np.array([1, NAN, 4, NAN, NAN, 7], np.float32),
        parsed=np.array([1, 0, 1, 0, 0, 1], np.uint8),
    )
    result = as_result(verdict_means(rows([0, 0, 1]), verdicts))
    np.testing.assert_array_equal(result.columns["rewards"].values, np.float32([2.5, NAN, NAN]))
    assert result.columns["judged"].values.tolist() == [1, 0, 0]
    assert is_missing(result.columns["rewards"].values).tolist() == [False, True, True]
    assert result.metrics["unjudged"].value == pytest.approx(2 / 3) and result.metrics["verdict"].value == 2.5
    assert result.metrics["vote_variance"].value == 2.25


def test_a_column_without_any_verdict_reports_no_mean_of_nothing() -> None:
    nothing = Batch.of(parent_id=np.array([10]), score=np.float32([NAN]), parsed=np.array([0], np.uint8))
    result = as_result(verdict_means(rows([0]), nothing))
    assert set(result.metrics) == {"unjudged"} and result.metrics["unjudged"].value == 1


def test_both_orders_of_each_pair_of_a_group_stand_beside_each_other() -> None:
    made = as_result(both_orders(rows([0, 0, 1, 1, 1, 2]), rounds=1))
    columns = made.columns
    pairs = list(zip(columns["response_a"].rows(), columns["response_b"].rows(), strict=True))
    assert pairs == [("a", "b"), ("b", "a"), ("c", "d"), ("d", "c"), ("d", "e"), ("e", "d"), ("c", "e"), ("e", "c")]
    assert made.parent is not None and made.parent.tolist() == [0, 1, 2, 3, 3, 4, 2, 4]
    assert columns["row_a"].values.tolist() == [10, 11, 12, 13, 13, 14, 12, 14]
    assert made.metrics["pairs"].value == 4, "a row alone in its group meets nobody"


@pytest.mark.parametrize("count", range(2, 8))
def test_half_as_many_rounds_as_rows_are_all_pairs(count: int) -> None:
    made = as_result(both_orders(rows([0] * count), rounds=count // 2))
    assert made.columns.num_rows == count * (count - 1)


def test_a_win_rate_is_the_mean_of_both_orders_with_ties_as_halves() -> None:
    # a beats b in both orders; b and c: the judge takes whoever stands first, a tie; c and a: a tie, then a.
    said = [(10, 11, 1.0), (11, 10, 0.0), (11, 12, 1.0), (12, 11, 1.0), (12, 10, 0.5), (10, 12, 1.0)]
    result = as_result(win_rates(rows([0, 0, 0]), duels(said)))
    np.testing.assert_allclose(result.columns["rewards"].values, [(1 + 0.75) / 2, (0 + 0.5) / 2, (0.5 + 0.25) / 2])
    metrics = {name: one.value for name, one in result.metrics.items()}
    assert metrics["order_agreement"] == pytest.approx(1 / 3) and metrics["ties"] == pytest.approx(1 / 3)
    assert metrics["pairs_judged"] == 1 and metrics["first_wins"] == pytest.approx(4.5 / 6)


def test_a_pair_that_one_order_has_no_verdict_on_does_not_count() -> None:
    result = as_result(win_rates(rows([0, 0, 1, 1]), duels([(10, 11, 1.0), (11, 10, NAN), (12, 13, 0), (13, 12, 1)])))
    np.testing.assert_array_equal(result.columns["rewards"].values, np.float32([NAN, NAN, 0, 1]))
    assert result.metrics["pairs_judged"].value == 0.5 and result.metrics["unjudged"].value == 0.5


def test_verdicts_outside_of_0_and_1_are_no_wins() -> None:
    with pytest.raises(ValueError, match="verdicts in"):
        win_rates(rows([0, 0]), duels([(10, 11, 3.0), (11, 10, 0.0)]))


def test_a_list_has_all_texts_of_a_group_and_its_scores_come_back_to_their_rows() -> None:
    batch = rows([0, 0, 0, 1, 1])
    made = as_result(listed(batch, rng=np.random.default_rng(1)))
    assert made.parent is not None and made.parent.tolist() == [0, 3]
    text, ids = made.columns["listing"].row(0), made.columns["listed_rows"].row(0)
    assert sorted(ids.tolist()) == [10, 11, 12]
    assert text == "\n\n".join(f"Response {k}:\n{chr(ord('a') + id_ - 10)}" for k, id_ in enumerate(ids, start=1))
    verdicts = made.columns.with_columns(
        numbers=Column.ragged([ids - 10.0, [1.0]], dtype=np.float32), parsed=Column.dense([1, 1], np.uint8)
    )
    result = as_result(list_scores(batch, verdicts))
    np.testing.assert_array_equal(result.columns["rewards"].values, np.float32([0, 1, 2, NAN, NAN]))
    assert result.metrics["wrong_length"].value == 0.5, "one number for two responses says nothing"
