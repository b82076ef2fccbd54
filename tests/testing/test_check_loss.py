"""`check_loss`: what the library has passes, and each kind of fault is named with its value."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest

from rlhf_dist.algorithms.contract import loss_name
from rlhf_dist.testing import CheckFailed, check_loss
from tests.algorithms.test_loss_properties import IDS, LOSSES


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_every_loss_of_the_library_passes(loss: Any) -> None:
    check_loss(loss)


@dataclass(frozen=True)
class Base:
    """-advantage * log pi, with one fault in each class below."""

    reads: tuple[str, ...] = ("advantages",)
    outputs: tuple[str, ...] = ("log_probs",)
    average: str = "tokens"

    def __call__(self, model: Any, rows: Any) -> Any:
        return -rows["advantages"] * model.log_probs, {}


class DividesByItsCount(Base):
    def __call__(self, model: Any, rows: Any) -> Any:
        return super().__call__(model, rows)[0] / rows.mask.sum().clamp(min=1), {}


@dataclass(frozen=True)
class CentresWithinItsMicroBatch(Base):
    average: str = "rows"

    def __call__(self, model: Any, rows: Any) -> Any:
        per_row = rows.sum_tokens(rows["advantages"] * model.log_probs)
        return (per_row - per_row.mean()) ** 2, {}


class ItsMetricIsAShare(Base):
    def __call__(self, model: Any, rows: Any) -> Any:
        loss = super().__call__(model, rows)[0]
        return loss, {"share": loss.detach() / loss.detach().abs().sum()}


class Reduced(Base):
    def __call__(self, model: Any, rows: Any) -> Any:
        return super().__call__(model, rows)[0].mean(), {}


@dataclass(frozen=True)
class TrainsOnMasked(Base):
    average: str = "rows"

    def __call__(self, model: Any, rows: Any) -> Any:
        return model.log_probs.new_zeros(rows.num_rows).index_add(0, rows.row_of_token, model.log_probs), {}


@dataclass(frozen=True)
class DividesByLength(Base):
    average: str = "rows"

    def __call__(self, model: Any, rows: Any) -> Any:
        length = model.log_probs.new_zeros(rows.num_rows)
        length = length.index_add(0, rows.row_of_token, model.log_probs.new_ones(len(model.log_probs)))
        return rows.sum_tokens(model.log_probs) / length, {}


@dataclass(frozen=True)
class NeedsTwoRows(Base):
    average: str = "rows"

    def __call__(self, model: Any, rows: Any) -> Any:
        if rows.num_rows < 2:
            raise ValueError("a single row")
        return rows.sum_tokens(model.log_probs), {}


class RootOfTheDifference(Base):
    def __call__(self, model: Any, rows: Any) -> Any:
        return (model.log_probs - rows["advantages"]).abs().sqrt(), {}


class Detached(Base):
    def __call__(self, model: Any, rows: Any) -> Any:
        return -rows["advantages"] * model.log_probs.detach(), {}


@dataclass(frozen=True)
class CountsEmptyRows(Base):
    average: str = "rows_with_tokens"

    def __call__(self, model: Any, rows: Any) -> Any:
        return rows.mean_tokens(model.log_probs) + 1.0, {}


@dataclass(frozen=True)
class CannotTravel(Base):
    lock: Any = field(default_factory=threading.Lock)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (
            DividesByItsCount(),
            r"its value depends on how a batch is cut.*passes of one row.* \d.*apart.*one number per token",
        ),
        (CentresWithinItsMicroBatch(), "depends on how a batch is cut into micro-batches.*one number per row"),
        (ItsMetricIsAShare(), "metric 'share' depends on how a batch is cut"),
        (Reduced(), r"averages over tokens, so its value must have shape \[28\].*got \[\]; return it unreduced"),
        (TrainsOnMasked(), "a token that response_mask leaves out has a gradient of 1 at log_probs"),
        (DividesByLength(), "with an empty response, its value is nan"),
        (NeedsTwoRows(), "with passes of one row, ValueError: a single row"),
        (RootOfTheDifference(), "with all values equal to 0, its gradient at log_probs is (inf|nan)"),
        (Detached(), "its gradient at log_probs is 0 on a random batch"),
        (CountsEmptyRows(), "a row without a counted token has loss 1; it must be 0"),
        (CannotTravel(), "cannot travel to the workers"),
        (Base(reads=("progress",)), r"reads 'progress', a column of your own; say its shape.*columns={'progress': "),
        (Base(reads=("answer",)), r"reads 'answer' \(\[B\] text\); a loss gets numbers"),
        (Base(outputs=("logits",)), "asks the model for 'logits'; there is log_probs"),
        (object(), "it is no loss: it has no reads, outputs, average"),
    ],
    ids=lambda value: loss_name(value) if not isinstance(value, str) else "",
)
def test_a_fault_is_one_line_with_its_value(loss: Any, said: str) -> None:
    with pytest.raises(CheckFailed, match=said) as failed:
        check_loss(loss)
    assert str(failed.value).startswith(loss_name(loss)) and "\n" not in str(failed.value)


def test_a_column_of_ones_own_has_the_shape_that_is_said() -> None:
    class Weighted(Base):
        def __call__(self, model: Any, rows: Any) -> Any:
            return -rows["progress"][rows.row_of_token] * model.log_probs, {}

    check_loss(Weighted(reads=("progress",)), columns={"progress": "[B]"})
