"""What is known of rows from the rows that were made of them."""

from __future__ import annotations

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import as_result
from rlhf_dist.missing import MISSING, is_missing
from rlhf_dist.transforms import group_by_parent, mean_of_children


def ids(*values: int) -> Column:
    return Column(np.array(values, dtype=np.int64))


def test_a_row_has_the_mean_of_what_was_made_of_it() -> None:
    batch = Batch({"row_id": ids(5, 6, 7, 8), "group_id": ids(0, 0, 0, 0)})
    children = Batch(
        {
            "parent_id": ids(6, 5, 6, 7, 6, 99),
            "group_id": ids(0, 0, 0, 0, 0, 0),
            "score": Column(np.array([1, 3, 0, MISSING, MISSING, 9], np.float32)),
        }
    )
    result = as_result(mean_of_children(batch, children, column="score", into="rewards"))
    found = result.columns["rewards"].values
    # 5: 3. 6: (1 + 0) / 2, its third is missing. 7: its only one is missing. 8: nothing was made of it.
    assert found[:2].tolist() == [3, 0.5] and is_missing(found[2:]).all()
    assert result.metrics["childless"].value == 2 and result.metrics["reward"].value == 1.75
    nothing = as_result(mean_of_children(batch, children.slice(0, 0), column="score", into="rewards"))
    assert is_missing(nothing.columns["rewards"].values).all() and "reward" not in nothing.metrics


def test_verdicts_on_one_response_are_a_group() -> None:
    assert group_by_parent(Batch({"parent_id": ids(4, 4, 9)}))["group_id"].values.tolist() == [4, 4, 9]
