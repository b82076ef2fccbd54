"""HybridFlow's rank groups and costs (arXiv 2409.19256): Fig. 8 and Table 2, exactly."""

from __future__ import annotations

from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest

from rlhf_dist.reshard.groups import (
    Cut,
    Parallel,
    generation_grid,
    groups_along,
    parallel_layout,
    rollout_axes,
    rollout_grid,
    training_grid,
    transition_cost,
)
from rlhf_dist.reshard.layout import Layout, LayoutError, ParameterLayout
from rlhf_dist.reshard.routes import lower_bound_bytes, make_routes

FIG8 = Parallel(p=1, t=4, d=2, p_g=1, t_g=2)


def from_one(groups: list[list[int]]) -> list[list[int]]:
    return [[rank + 1 for rank in group] for group in groups]


def test_figure_8() -> None:
    train = training_grid(FIG8)
    assert from_one(groups_along(train, 2)) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert from_one(groups_along(train, 0)) == [[1, 5], [2, 6], [3, 7], [4, 8]]
    generate = generation_grid(FIG8, "zero_redundancy")
    assert from_one(groups_along(generate, 3)) == [[1, 3], [2, 4], [5, 7], [6, 8]]
    assert from_one(groups_along(generate, 1)) == [[1, 2], [3, 4], [5, 6], [7, 8]]
    vanilla = generation_grid(FIG8, "vanilla")
    assert from_one(groups_along(vanilla, 3)) == [[1, 2], [3, 4], [5, 6], [7, 8]]


MODEL = {"w": Cut((8, 4), 0)}


def overlap(grouping: str) -> list[int]:
    """GPUs (from 1) that hold nothing of their generation shard after training 1-4-2."""
    source = parallel_layout(MODEL, training_grid(FIG8), "bfloat16")
    target = parallel_layout(MODEL, generation_grid(FIG8, grouping), "bfloat16")  # type: ignore[arg-type]
    missing = lower_bound_bytes(source, target) == target.bytes_per_rank()
    return [rank + 1 for rank in np.flatnonzero(missing).tolist()]


def test_gpus_without_overlap_under_the_vanilla_grouping() -> None:
    assert overlap("vanilla") == [2, 3, 6, 7]
    assert overlap("zero_redundancy") == []


def test_table_2() -> None:
    p, t, d, p_g, t_g = 2, 8, 4, 1, 4
    sizes = Parallel(p, t, d, p_g, t_g)
    chat, v, ours = (transition_cost(sizes, e) for e in ("DeepSpeed-Chat", "HybridFlow-V", "HybridFlow"))  # type: ignore[arg-type]
    assert (chat.received, chat.peak, chat.redundant) == (Fraction(63, 64), 1, Fraction(1, 64))
    assert (v.received, v.peak, v.redundant) == (Fraction(15, 16), 1, Fraction(1, 16))
    assert (ours.received, ours.peak, ours.redundant) == (Fraction(16 - 4, 4 * 16), Fraction(1, 4), 0)


@pytest.mark.parametrize(
    "sizes",
    [FIG8, Parallel(2, 8, 2, 1, 4), Parallel(4, 2, 1, 2, 1), Parallel(1, 8, 1, 1, 8), Parallel(2, 2, 2, 2, 2)],
    ids=str,
)
def test_a_zero_redundancy_plan_costs_what_table_2_says(sizes: Parallel) -> None:
    model = {f"layers.{i}": Cut((16, 4), 0, Fraction(i, 8)) for i in range(8)}
    size = 8 * 16 * 4 * 2
    source = parallel_layout(model, training_grid(sizes), "bfloat16")
    target = parallel_layout(model, generation_grid(sizes, "zero_redundancy"), "bfloat16")
    routes = make_routes(source, target, [rank // (sizes.p * sizes.t) for rank in range(sizes.world)])
    cost = transition_cost(sizes, "HybridFlow")
    assert set(routes.moved.tolist()) == {int(cost.received * size)}
    assert set(target.bytes_per_rank().tolist()) == {int(cost.peak * size)}
    held = target.bytes_per_rank() - routes.moved
    assert (source.bytes_per_rank() - held == cost.redundant * size).all()
    # With each training replica on a machine, everything arrives from the own micro data-parallel group.
    groups = groups_along(generation_grid(sizes, "zero_redundancy"), 1)
    home = {rank: set(group) for group in groups for rank in group}
    for rows in routes.transfers.values():
        for sender, group in zip(rows.sender.tolist(), rows.group.tolist(), strict=True):
            assert set(routes.groups[group]) <= home[sender]


@pytest.mark.parametrize(("t_g", "train_t"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 2), (2, 4)])
def test_colocated_generation_takes_the_grouping_that_moves_least(t_g: int, train_t: int) -> None:
    """Against every way to give 4 ranks their places."""
    model = {"column": Cut((16, 8), 0), "row": Cut((8, 16), 1), "norm": Cut((16,), None)}
    mesh = np.arange(4).reshape(-1, train_t)
    source = {}
    for name, cut in model.items():
        # Tensor parallelism cuts first, full sharding cuts what is left on dim 0.
        source[name] = ParameterLayout.from_mesh(cut.shape, "bfloat16", mesh, [0, cut.dim], (1, 0))
    moved = {}
    for order in permutations(range(4)):
        target = parallel_layout(model, np.array(order).reshape(-1, 1, t_g), "bfloat16")
        moved[order] = int(lower_bound_bytes(Layout(4, source), target).sum())
    chosen = rollout_grid(rollout_axes(4, t_g, train_t=train_t))
    assert all(group == sorted(group) for group in chosen.tolist())
    assert moved[tuple(chosen.reshape(-1).tolist())] == min(moved.values())


def test_generation_groups_stay_on_a_node() -> None:
    assert rollout_grid(rollout_axes(8, 2, ranks_per_node=4)).tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    with pytest.raises(LayoutError, match="generation 4"):
        rollout_axes(8, 4, ranks_per_node=2)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(LayoutError, match="t_g must divide t"):
        Parallel(1, 4, 2, 1, 3)
