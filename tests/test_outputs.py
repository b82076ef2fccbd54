"""Columns by reference: kept while somebody will read them, dropped right after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from controller.execution.batch_ref import BatchRef, FetchPlan, Located, RowTable, StoredColumn, merge_stored
from controller.execution.executor import StepReport, run_steps
from controller.execution.outputs import Outputs, RowsError, join
from controller.execution.simulated_workers import AtOnce, SimulatedWorkers
from recipes.policy_gradient.ppo import ppo
from recipes.policy_gradient.remax import remax
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.wire import Call, Reply


def row_table(groups: Any) -> RowTable:
    """Rows of these groups, 5 tokens each, with their positions as ids."""
    count = len(groups)
    return RowTable(np.asarray(groups), np.full(count, 5), np.arange(count), np.full(count, -1))


def stored(*names: str, rows: int = 2) -> BatchRef:
    at = Located(("object",), np.zeros(rows, np.int32), np.arange(rows, dtype=np.int32))
    table = row_table(np.arange(rows))
    return BatchRef(table, {name: StoredColumn(at, (name,)) for name in names})


def test_a_column_is_dropped_when_its_last_reader_is_done_and_one_nobody_reads_at_once() -> None:
    dataflow = trace(ppo)
    outputs = Outputs(dataflow)
    generate = dataflow["actor.generate_sequences"]
    outputs.put("prompts", 0, stored("group_id", "prompt_ids", "prompt", "answer"))
    columns = outputs.input(generate.inputs[0], 0).columns
    assert set(columns) == {"group_id", "prompt_ids", "prompt", "answer"}, "all are read or carried for someone"
    outputs.put(generate.name, 0, stored(*columns, *generate.writes))
    outputs.done(generate, 0)
    assert not outputs.batch("prompts", 0).columns, "generation carries what others need"
    left = outputs.batch(generate.name, 0).columns
    assert "finished" not in left and "policy_version" not in left, "nobody reads these"
    assert "response" in left
    outputs.done(dataflow["reward.compute_reward"], 0)
    assert "response" not in outputs.batch(generate.name, 0).columns, "only the reward read the text"
    assert "response_ids" in outputs.batch(generate.name, 0).columns


def test_without_a_graph_everything_is_kept_until_the_step_ends() -> None:
    outputs = Outputs(None)
    outputs.put("a", 0, stored("x"))
    outputs.done(Node(name="b", role="r", op="b", kind="op"), 0)
    assert outputs.columns_kept(0) == 1
    outputs.end_step(0)
    assert outputs.columns_kept(0) == 0


def test_a_join_needs_one_row_of_every_group() -> None:
    left = row_table([3, 1, 3])
    right = stored("rewards", rows=4)
    joined = join(left, right, {"rewards": "baseline"})
    assert joined.columns["baseline"].at.row_of.tolist() == [3, 1, 3]
    with pytest.raises(RowsError, match="no row on the right side for 1 of 1 rows"):
        join(row_table([9]), right, {})
    twice = BatchRef(row_table([1, 1]), {})
    with pytest.raises(RowsError, match="group 1 has several"):
        join(left, twice, {})


def test_a_join_on_children_takes_what_was_made_of_each_row() -> None:
    left, right = row_table([7, 7]), stored("rewards", rows=2)
    answers = replace(right, rows=replace(right.rows, parent=np.array([1, 0])))
    joined = join(left, answers, {"rewards": "verdict"}, on="child")
    assert joined.columns["verdict"].at.row_of.tolist() == [1, 0]
    twice = replace(right, rows=replace(right.rows, parent=np.array([1, 1])))
    with pytest.raises(RowsError, match="child 1 has several"):
        join(left, twice, {}, on="child")
    with pytest.raises(RowsError, match="no row on the right side for 2 of 2 rows"):
        join(left, replace(right, rows=replace(right.rows, parent=np.array([8, 9]))), {}, on="child")


def test_resharding_between_groups_of_different_sizes_asks_each_rank_for_the_objects_it_needs() -> None:
    """Four ranks wrote, three read: rows move by index, two column groups share their index arrays."""
    order = np.arange(8)
    columns = merge_stored([((("a",), f"a{k}"), (("b",), f"b{k}")) for k in range(4)], order, [2, 2, 2, 2])
    plan = FetchPlan(BatchRef(row_table(order), columns))
    for rows in np.array_split(order, 3):
        first, second = plan.fetches(rows)
        wrote = rows // 2
        assert [first.refs[k] for k in first.object_of] == [f"a{k}" for k in wrote]
        assert [second.refs[k] for k in second.object_of] == [f"b{k}" for k in wrote]
        assert first.row_of.tolist() == (rows % 2).tolist()
        assert set(first.refs) == {f"a{k}" for k in wrote} and first.object_of is second.object_of
    (empty, _) = plan.fetches(np.empty(0, np.int64))
    assert empty.refs == ("a0",), "a rank without rows learns types from an object"


@pytest.mark.parametrize("recipe", [ppo, remax])
def test_a_thousand_simulated_ranks_run_the_real_runner_and_leave_nothing_behind(recipe: object) -> None:
    dataflow = trace(recipe)  # type: ignore[arg-type]
    workers = SimulatedWorkers(
        dataflow, prompts=2048, prompt_tokens=16, response_tokens=lambda rng, rows: rng.integers(1, 99, rows)
    )
    runner = workers.runner({role: ("main", 1024) for role in ("actor", "critic", "reference")})
    finished: dict[str, int] = {}

    def on_step(report: object) -> None:
        finished.update({node.node: node.tokens for node in report.nodes})  # type: ignore[attr-defined]

    run_steps(dataflow, runner, start=0, stop=2, on_step=on_step)
    assert set(finished) == {node.name for node in dataflow}
    assert 2048 * 17 <= finished["actor.update_actor"] <= 2048 * 115
    assert runner.outputs.columns_kept(1) == 0


def test_a_rule_scores_each_ranks_rows_as_soon_as_that_rank_has_generated_them() -> None:
    log: list[tuple[str, int]] = []

    class Logged(SimulatedWorkers):
        def reply(self, call: Call) -> Reply:
            log.append((call.node, call.num_rows))
            return super().reply(call)

    class OneByOne(AtOnce):
        def ready(self, refs: Sequence[Any], timeout_s: float) -> list[Any]:
            log.append(("reply", 1))
            return list(refs[:1])

    workers = Logged(trace(ppo), prompts=8, prompt_tokens=4, response_tokens=lambda rng, n: rng.integers(1, 9, n))
    placed = dict.fromkeys(("actor", "critic", "reference"), ("main", 4))
    reports: list[StepReport] = []
    runner = workers.runner(placed, replies=OneByOne())
    run_steps(workers.dataflow, runner, start=0, stop=1, on_step=reports.append)
    names = [name for name, _ in log]
    first = names.index("actor.generate_sequences")
    scored = [at for at, name in enumerate(names) if name == "reward.compute_reward"]
    between = [names[a:b].count("reply") for a, b in zip([first, *scored], scored, strict=False)]
    assert between == [1, 1, 1, 1], "a call to the rule after each rank's reply"
    assert sum(rows for name, rows in log if name == "reward.compute_reward") == 8
    ended = {node.node: node.ended_s for node in reports[0].nodes}
    assert ended["actor.generate_sequences"] <= ended["reward.compute_reward"] <= ended["gae"]
