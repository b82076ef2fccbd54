"""Host ops that write advantages: by hand, on empty input, and on input that is no number."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostOp, as_result
from rlhf_dist.metrics import Mean
from rlhf_dist.transforms import (
    best_of_group,
    clip_rewards,
    drop_equal_groups,
    gae,
    grpo_advantage,
    keep_best_and_worst,
    lagrangian_advantage,
    mask_cut_responses,
    penalise_cut_responses,
    remax_advantage,
    rloo_advantage,
    whiten,
    whiten_rewards,
)

CALLS: dict[str, tuple[HostOp[Any, Any], dict[str, Any]]] = {
    "gae": (gae, {"gamma": 0.9, "lam": 0.95}),
    "gae with everything": (gae, {"gamma": 0.9, "lam": 0.95, "kl_coef": 0.1, "dense": True}),
    "whiten": (whiten, {}),
    "whiten as a peer does": (whiten, {"centre": False, "ddof": 1}),
    "whiten_rewards": (whiten_rewards, {}),
    "clip_rewards": (clip_rewards, {"low": -0.5, "high": 0.5}),
    "mask_cut_responses": (mask_cut_responses, {}),
    "penalise_cut_responses": (penalise_cut_responses, {"penalty": 1.0}),
    "grpo_advantage": (grpo_advantage, {}),
    "grpo_advantage over the batch": (grpo_advantage, {"scale_over": "batch", "ddof": 1}),
    "rloo_advantage": (rloo_advantage, {"kl_coef": 0.1}),
    "remax_advantage": (remax_advantage, {"kl_coef": 0.1}),
    "lagrangian_advantage": (lagrangian_advantage, {"lam": 0.5}),
    "keep_best_and_worst": (keep_best_and_worst, {}),
    "drop_equal_groups": (drop_equal_groups, {}),
    "best_of_group": (best_of_group, {}),
}
PER_ROW = ("rewards", "baseline_rewards")
PER_TOKEN = (
    "values",
    "old_log_probs",
    "ref_log_probs",
    "token_rewards",
    "advantages",
    "cost_advantages",
)


def ragged(rows: list[list[float]], dtype: str = "float32") -> Column:
    return Column.ragged(rows, dtype=dtype)


def random_batch(lengths: list[int], seed: int = 0, group: int = 2) -> Batch:
    """Every column an op may read; `group` rows per prompt."""
    random = np.random.default_rng(seed)
    rows, offsets = len(lengths), np.cumsum([0, *lengths]).astype(np.int64)
    columns = {name: Column(random.normal(size=offsets[-1]).astype(np.float32), offsets) for name in PER_TOKEN}
    columns |= {name: Column(random.normal(size=rows).astype(np.float32)) for name in PER_ROW}
    columns["response_mask"] = Column(random.integers(0, 2, offsets[-1]).astype(np.uint8), offsets)
    columns["finished"] = Column(random.integers(0, 2, rows).astype(np.uint8))
    columns["group_id"] = Column(np.arange(rows, dtype=np.int64) // group)
    return Batch(columns)


def test_gae_puts_kl_and_terminal_reward_where_they_belong() -> None:
    batch = Batch(
        {
            "rewards": Column.dense([2.0, 5.0], np.float32),
            "values": ragged([[0.5, 1.0, 9.0], []]),
            "response_mask": ragged([[1, 1, 0], []], "uint8"),
            "old_log_probs": ragged([[-1.0, -2.0, 7.0], []]),
            "ref_log_probs": ragged([[-1.5, -1.0, 0.0], []]),
        }
    )
    result = as_result(gae(batch, gamma=1.0, lam=1.0, kl_coef=0.1))
    # Token rewards: -0.05, +0.1 + 2; the third token does not count, the second row has no token.
    np.testing.assert_allclose(result.columns["returns"].values, [2.05, 2.1, 0], rtol=1e-6)
    np.testing.assert_allclose(result.columns["advantages"].values, [1.55, 1.1, 0], rtol=1e-6)
    assert result.columns["returns"].lengths.tolist() == [3, 0]
    assert result.metrics["ref_kl"] == Mean(-0.5, 2.0)
    k3 = (math.exp(-0.5) - 0.5) + (math.e - 2)
    assert result.metrics["ref_kl_k3"].value == pytest.approx(k3 / 2)
    # Squared: -0.1 * 0.125 and -0.1 * 0.5, the second cut to 0.25 nats.
    squared = as_result(gae(batch, gamma=1.0, lam=0.0, kl_coef=0.1, kl_estimator="k2", kl_cap=0.25))
    np.testing.assert_allclose(squared.columns["returns"].values, [1 - 0.0125, 2 - 0.025, 0], rtol=1e-6)
    assert result.metrics["reward"] == Mean(7.0, 2.0)
    assert result.metrics["rows_without_tokens"].value == 1


def test_rewards_of_turns_fall_where_they_are_and_their_sum_is_not_added_again() -> None:
    mask = np.array([1, 1, 0, 1], dtype=np.uint8)
    ids = np.array([0, 4])
    batch = Batch(
        {
            "response_mask": Column(mask, ids),
            "rewards": Column.dense([3.0], dtype=np.float32),
            "values": Column(np.zeros(4, np.float32), ids),
            "token_rewards": Column(np.array([0, 1, 0, 2], np.float32), ids),
        }
    )
    result = as_result(gae(batch, gamma=1.0, lam=1.0, dense="alone"))
    assert result.columns["returns"].values[mask == 1].tolist() == [3.0, 3.0, 2.0]


def test_gae_adds_token_rewards_when_dense() -> None:
    batch = random_batch([3, 2])
    sparse = as_result(gae(batch, gamma=1.0, lam=1.0)).columns["returns"].values
    dense = as_result(gae(batch, gamma=1.0, lam=1.0, dense=True)).columns["returns"].values
    assert not np.allclose(sparse, dense)


def test_ops_declare_the_reference_only_where_they_read_it() -> None:
    base = ("rewards", "values", "response_mask")
    assert gae.read_of({"gamma": 1.0})[0] == base
    assert gae.read_of({"kl_coef": 0.0, "dense": True})[0] == (*base, "token_rewards")
    assert gae.read_of({"kl_coef": 0.1})[0] == (*base, "old_log_probs", "ref_log_probs")
    adaptive = object()  # A coefficient that only the running system knows.
    assert "ref_log_probs" in gae.read_of({"kl_coef": adaptive})[0]
    assert "ref_log_probs" not in rloo_advantage.read_of({})[0]


@pytest.mark.parametrize("name", CALLS)
def test_an_op_needs_no_column_it_does_not_declare_and_writes_the_declared_ones(name: str) -> None:
    op, arguments = CALLS[name]
    batch = random_batch([2, 3, 0, 1])
    result = as_result(op(batch.select(*op.read_of(arguments)[0]), **arguments))
    assert set(result.columns) == set(op.written_for(arguments))
    assert (result.keep is not None) == (op.rows == "drop")
    assert result.columns.num_rows == (batch.num_rows if result.keep is None else len(result.keep))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0, 0]])
def test_no_rows_and_empty_responses_are_fine(name: str, lengths: list[int]) -> None:
    op, arguments = CALLS[name]
    result = as_result(op(random_batch(lengths), **arguments))
    assert all(np.isfinite(column.values).all() for column in result.columns.values())
    assert all(np.isfinite(metric.value) for metric in result.metrics.values())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_an_error_that_names_column_and_row(name: str, bad: float) -> None:
    op, arguments = CALLS[name]
    batch = random_batch([2, 2, 2, 2])
    for column in op.read_of(arguments)[0]:
        if column in ("response_mask", "group_id", "finished"):
            continue
        values = batch[column].values.copy()
        values[-1] = bad
        broken = batch.with_columns({column: Column(values, batch[column].offsets)})
        with pytest.raises(ValueError, match=rf"column '{column}'.*1 of 4 rows \(row 3\)"):
            op(broken, **arguments)


def test_a_column_cut_otherwise_than_the_responses_is_an_error() -> None:
    batch = random_batch([2, 3]).with_columns(values=ragged([[1, 2], [1, 2]]))
    with pytest.raises(
        ValueError, match="'values' must have one entry per response token, got 2 for the 3 tokens of row 1"
    ):
        gae(batch, gamma=1.0, lam=1.0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), pairs=st.integers(1, 5), cut=st.integers(0, 5))
@pytest.mark.parametrize("name", [name for name, (op, arguments) in CALLS.items() if op.scope_of(arguments) != "batch"])
def test_cutting_by_rows_or_groups_does_not_change_the_result(name: str, seed: int, pairs: int, cut: int) -> None:
    op, arguments = CALLS[name]
    lengths = np.random.default_rng(seed).integers(0, 4, 2 * pairs).tolist()
    batch, edge = random_batch(lengths, seed), 2 * min(cut, pairs)
    whole = as_result(op(batch, **arguments))
    parts = [as_result(op(part, **arguments)) for part in (batch.slice(0, edge), batch.slice(edge, 2 * pairs))]
    for column in whole.columns:
        together = np.concatenate([part.columns[column].values for part in parts])
        np.testing.assert_allclose(together, whole.columns[column].values, rtol=1e-5, atol=1e-6)
    if whole.keep is not None:
        first, second = parts[0].keep, parts[1].keep
        assert first is not None and second is not None
        assert [*first, *(second + edge)] == whole.keep.tolist()


def test_group_advantages_by_hand() -> None:
    batch = Batch(
        {
            "rewards": Column.dense([1, 0, 4, 4], np.float32),
            "baseline_rewards": Column.dense([0.5, 0.5, 4, 5], np.float32),
            "group_id": Column.dense([8, 8, 3, 3], np.int64),
            "response_mask": ragged([[1, 1], [1, 0], [1], []], "uint8"),
        }
    )
    grpo = as_result(grpo_advantage(batch, scale=False))
    assert grpo.columns["advantages"].values.tolist() == [0.5, 0.5, -0.5, 0, 0]
    assert grpo.metrics["zero_variance_groups"] == Mean(1.0, 2.0)
    assert as_result(rloo_advantage(batch)).columns["advantages"].values.tolist() == [1, 1, -1, 0, 0]
    assert as_result(remax_advantage(batch)).columns["advantages"].values.tolist() == [0.5, 0.5, -0.5, 0, 0]


def test_rloo_and_remax_take_the_kl_of_the_whole_response_off_the_reward() -> None:
    batch = Batch(
        {
            "rewards": Column.dense([1, 1], np.float32),
            "baseline_rewards": Column.dense([0, 0], np.float32),
            "group_id": Column.dense([0, 0], np.int64),
            "response_mask": ragged([[1, 1, 0], [1]], "uint8"),
            "old_log_probs": ragged([[-1, -1, -1], [-1]]),
            "ref_log_probs": ragged([[-2, -3, -9], [-1]]),
        }
    )
    remax = as_result(remax_advantage(batch, kl_coef=0.1)).columns["advantages"].values
    np.testing.assert_allclose(remax, [0.7, 0.7, 0, 1], rtol=1e-6)
    rloo = as_result(rloo_advantage(batch, kl_coef=0.1)).columns["advantages"].values
    np.testing.assert_allclose(rloo, [-0.3, -0.3, 0, 0.3], rtol=1e-6)
    # Log-ratios 1, 2 and 0 over the counted tokens: k2 is 0.5 + 2 in the first row.
    result = as_result(remax_advantage(batch, kl_coef=0.1, kl_estimator="k2"))
    np.testing.assert_allclose(result.columns["advantages"].values, [0.75, 0.75, 0, 1], rtol=1e-6)
    assert result.metrics["ref_kl"] == Mean(3.0, 3.0)
    result = as_result(rloo_advantage(batch, kl_coef=0.1))
    assert result.metrics["ref_kl"] == Mean(3.0, 3.0)
    assert result.metrics["zero_variance_groups"] == Mean(1.0, 1.0), "the rewards are equal, whatever the penalty"
    # Rewards 0.7 and 1 less their mean.
    grpo = as_result(grpo_advantage(batch, kl_coef=0.1, scale=False))
    np.testing.assert_allclose(grpo.columns["advantages"].values, [-0.15, -0.15, 0, 0.15], rtol=1e-5)


def test_rewards_cut_and_brought_to_one_scale() -> None:
    batch = Batch({"rewards": Column.dense([1, 2, 3, 4], np.float32)})
    cut = as_result(clip_rewards(batch, low=1.5, high=3))
    assert cut.columns["rewards"].values.tolist() == [1.5, 2, 3, 3]
    assert cut.metrics["clipped_rewards"] == Mean(2.0, 4.0)
    kept = as_result(whiten_rewards(batch)).columns["rewards"].values
    np.testing.assert_allclose(kept, [1.1583592, 2.0527864, 2.9472136, 3.8416408], rtol=1e-6)
    centred = as_result(whiten_rewards(batch, centre=True, ddof=1)).columns["rewards"].values
    np.testing.assert_allclose(centred, np.array([-1.5, -0.5, 0.5, 1.5]) / math.sqrt(5 / 3), rtol=1e-6)


def test_responses_that_were_cut_have_no_loss_or_pay_for_it() -> None:
    batch = Batch(
        {
            "finished": Column.dense([1, 0, 0], np.uint8),
            "response_mask": ragged([[1, 0], [1, 1], []], "uint8"),
            "rewards": Column.dense([3, 3, 1], np.float32),
        }
    )
    masked = as_result(mask_cut_responses(batch)).columns["response_mask"]
    assert masked.values.tolist() == [1, 0, 0, 0] and masked.values.dtype == np.uint8
    charged = as_result(penalise_cut_responses(batch, penalty=0.5))
    assert charged.columns["rewards"].values.tolist() == [3, 2.5, 0.5]
    assert charged.metrics["penalised"] == Mean(2.0, 3.0)
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        penalise_cut_responses(batch, penalty=-1)


def test_a_number_that_float32_cannot_hold_is_an_error() -> None:
    batch = Batch({"rewards": Column.dense([1.0, 1e300], np.float64)})
    with pytest.raises(ValueError, match=r"column 'rewards' must hold finite numbers, got 1e\+300 in 1 of 2 rows"):
        clip_rewards(batch, low=0, high=1)


def test_whiten_covers_the_whole_batch() -> None:
    batch = random_batch([4, 0, 5], seed=3)
    whitened = as_result(whiten(batch)).columns["advantages"].values[batch["response_mask"].values > 0]
    assert whiten.scope_of({}) == grpo_advantage.scope_of({"scale_over": "batch"}) == "batch"
    assert grpo_advantage.scope_of({}) == "groups"
    np.testing.assert_allclose([whitened.mean(), whitened.std()], [0, 1], atol=1e-6)


def test_lagrangian_advantage_by_hand() -> None:
    batch = Batch({"advantages": ragged([[4.0], []]), "cost_advantages": ragged([[1.0], []])})
    assert as_result(lagrangian_advantage(batch, lam=3.0)).columns["advantages"].values.tolist() == [0.25]


@pytest.mark.parametrize("name", CALLS)
def test_ops_travel_by_name(name: str) -> None:
    op: Callable[..., Any] = CALLS[name][0]
    assert pickle.loads(pickle.dumps(op)) is op
