"""Recipes that move rows: refill, where and merge, concat, joins by parent, host ops of several batches, updates with
terms; the same as a graph, line by line, in one process and on Ray, and after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.record.metrics import read_metrics
from rlhf_dist.testing import CheckFailed, check_recipe
from tests.runs.test_recipes import weights

RECIPE = '''
"""Rows that are drawn anew, parted, put together, matched and made."""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import nll, policy_gradient
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import host_op, refill
from rlhf_dist.dataflow.host import HostResult
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Examples, Prompts, Reference, Reward


@dataclass(frozen=True, kw_only=True)
class Rows:
    groups: int = 3
    rounds: int = 3
    short: str = "train"
    share: float = 0.5
    mini_batches: int = 2


def length(response):
    return float(len(response))


def prompt_number(batch):
    return batch["group_id"].values % 3


@host_op(reads=("group_id",), rows="drop", scope="groups")
def two_of_three(batch):
    """As a filter of rewards would, but known beforehand: every third group goes."""
    keep = np.flatnonzero(prompt_number(batch) != 0)
    return HostResult(columns=Batch({}, len(keep)), keep=keep)


@host_op(reads=("rewards", "response_mask", "row_id"), writes=("advantages", "is_long"))
def advantage(batch):
    assert len(set(batch["row_id"].rows())) == batch.num_rows
    mask, rewards = batch["response_mask"], batch["rewards"].values
    values = (rewards - 1).repeat(mask.lengths).astype("float32")
    return Batch({"advantages": Column(values, mask.offsets), "is_long": Column((rewards > 4).astype("int8"))})


@host_op(reads=("advantages",), writes=("advantages",))
def doubled(batch):
    return Batch({"advantages": Column(2 * batch["advantages"].values, batch["advantages"].offsets)})


@host_op(
    reads=(("row_id", "parent_id", "prompt_ids"), ("response_ids",)),
    writes=("response_ids", "response_mask"),
    rows="derive",
    scope="batch",
)
def mismatched(batch, others, *, share, rng):
    """Some of the rows, each with the response of another batch's row."""
    parent = np.flatnonzero(rng.random(batch.num_rows) < share)
    ids = others["response_ids"].take(parent % max(others.num_rows, 1))
    mask = Column(np.ones(len(ids.values), np.uint8), ids.offsets)
    return HostResult(
        columns=Batch({"response_ids": ids, "response_mask": mask}),
        parent=parent,
        metrics={"mismatched": Mean(float(len(parent)), 0)},
    )


@host_op(reads=("response_ids", "prompt_ids", "ref_log_probs", "parent_id", "prompt_number"), writes=("seen",))
def count(batch):
    return HostResult(
        columns=Batch({"seen": Column(batch["response_ids"].lengths)}),
        metrics={"rows": Mean(float(batch.num_rows), 0)},
    )


@host_op(reads=("group_id",), writes=("prompt_number",))
def numbered(batch):
    return Batch({"prompt_number": Column(prompt_number(batch))})


@recipe
def rows(prompts: Prompts, experts: Examples, actor: Actor, reference: Reference, reward: Reward, cfg: Rows) -> None:
    def attempt(given):
        given = numbered(given)
        batch = actor.generate_sequences(given, n=2)
        batch = batch.join(given, on="parent", prompt_number_of_parent="prompt_number")
        return two_of_three(reward.compute_reward(batch))

    batch = refill(prompts, attempt, groups=cfg.groups, rounds=cfg.rounds, short=cfg.short)
    batch = advantage(batch)
    long, short = batch.where("is_long")
    batch = doubled(long).merge(short)
    foreign = reference.compute_ref_log_prob(mismatched(batch, experts, share=cfg.share))
    foreign = count(foreign.join(batch, on="parent", prompt_number="prompt_number_of_parent"))
    both = batch.concat(foreign)
    both = reference.compute_ref_log_prob(both)
    terms = [(batch, policy_gradient()), (experts, nll(), 0.1), (foreign, nll(), -0.01)]
    actor.update_actor(terms, mini_batches=cfg.mini_batches)
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "rows.py").write_text(RECIPE)
    return tmp_path / "rows.py"


def test_a_graph_that_moves_rows_is_the_run_line_by_line_and_draws_until_it_has_enough(file: Path) -> None:
    metrics = check_recipe(file, steps=3, **{"data.prompts_per_step": 2, "algorithm.groups": 3})
    drawn = [[row.get(f"prompts{k}/rows", 0.0) for k in ("", "#2", "#3")] for row in metrics]
    # Of groups 0 1 | 2 3 | 4 5 | 6 7 | ... those are kept that 3 does not divide: 1, 2, 4 / 7, 8, 10 / ...
    assert drawn == [[2, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert [row["refill/groups"] for row in metrics] == [3, 3, 3]
    assert [row["refill/surplus_groups"] for row in metrics] == [1, 1, 1]
    settings = {"data.prompts_per_step": 3, "algorithm.groups": 2, "algorithm.mini_batches": 1}
    metrics = check_recipe(file, steps=3, **settings)
    assert [row["prompts/rows"] + row["prompts#2/rows"] + row["prompts#3/rows"] for row in metrics] == [3, 3, 3]
    assert [row["refill/rounds"] for row in metrics] == [1, 1, 1]
    assert all(row["count/rows"] == row["mismatched/mismatched"] for row in metrics)


def test_too_few_groups_stop_the_run_and_say_what_each_round_kept(file: Path) -> None:
    settings = {"data.prompts_per_step": 2, "algorithm.groups": 4, "algorithm.rounds": 2, "algorithm.short": "stop"}
    with pytest.raises(
        CheckFailed, match=r"rows.py:\d+: refill has 2 of 4 groups after 2 rounds, which kept 1, 1; raise"
    ):
        check_recipe(file, steps=1, **settings)


def test_on_ray_and_resumed_it_ends_with_the_same_weights(
    launch_warm: Callable[..., Any], file: Path, data: Path, tmp_path: Path
) -> None:
    settings = (
        *(f"data.sources.experts.path={data}", "actor.rollout.max_response_tokens=5", "data.prompts_per_step=2"),
        *("reward.function=length", "placement=colocate", "actor.optimizer.lr=1e-3"),
    )
    ray = ("placement.pools.main.slots=2", "actor.rollout.engine=transformers", "placement.host_processes=2")
    launch_warm(str(file), *settings, *ray, "steps=4", root=tmp_path / "ray")
    launch_warm(str(file), *settings, "steps=2", local=True, root=tmp_path / "local")
    launch_warm(str(file), *settings, "steps=4", "resume=auto", local=True, root=tmp_path / "local")
    ours, theirs = (read_metrics(tmp_path / root / "rows") for root in ("local", "ray"))
    assert [row["count/rows"] for row in ours] == [row["count/rows"] for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["reward/reward"] == pytest.approx(other["reward/reward"], rel=1e-6)
    first, second = (weights(tmp_path / root / "rows/models/actor") for root in ("local", "ray"))
    for name, values in first.items():  # two ranks sum gradients in another order than one
        np.testing.assert_allclose(second[name], values, atol=1e-4, err_msg=name)
