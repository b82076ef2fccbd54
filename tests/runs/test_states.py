"""States that hold more than numbers: statistics of prompts that filter what is drawn, rows of earlier steps."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.record.metrics import read_metrics
from rlhf_dist.testing import CheckFailed, check_recipe
from tests.runs.test_recipes import weights

RECIPE = '''
"""Prompts that were tried often are left out; half of each step's rows are of earlier ones."""

import numpy as np

from rlhf_dist.algorithms import policy_gradient
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.replay import REPLAYED, Replay
from rlhf_dist.roles import Actor, Prompts, Reward, State, state_op


class Small(Replay):
    capacity = 6


class Seen(State):
    def initial(self, cfg):
        return {"times": {}, "total": 0.0, "lengths": np.zeros(0), "last": ""}

    @state_op(reads=("prompt", "group_id"), rows="drop")
    def fresh(self, values, batch, *, most):
        keep = [row for row, prompt in enumerate(batch["prompt"].rows()) if values["times"].get(prompt, 0) < most]
        kept = {"kept": Mean(len(keep), 0)}
        return values, HostResult(columns=Batch({}, len(keep)), keep=np.array(keep, int), metrics=kept)

    @state_op(reads=("prompt", "response_ids"), writes=("often",))
    def report(self, values, batch):
        times, prompt = dict(values["times"]), ""
        for prompt in batch["prompt"].rows():
            times[prompt] = times.get(prompt, 0) + 1
        often = np.array([times[prompt] for prompt in batch["prompt"].rows()], np.float32)
        lengths = np.concatenate([values["lengths"], batch["response_ids"].lengths])
        new = {"times": times, "total": float(sum(times.values())), "lengths": lengths, "last": prompt}
        return new, HostResult(columns=Batch({"often": Column(often)}), metrics={"total": Mean(new["total"], 0)})


@host_op(reads=("rewards", "response_mask"), writes=("advantages",))
def advantage(batch, *, scale):
    mask = batch["response_mask"]
    return Batch({"advantages": Column(batch["rewards"].values.repeat(mask.lengths) / (1 + scale), mask.offsets)})


@recipe
def states(prompts: Prompts, actor: Actor, reward: Reward, seen: Seen, buffer: Small) -> None:
    prompts = seen.fresh(prompts, most=1)
    batch = reward.compute_reward(actor.generate_sequences(prompts))
    batch = seen.report(batch)
    old = buffer.sample(rows=3)
    buffer.add(batch)
    both = advantage(batch.concat(old), scale=seen.value("total") / 100)
    actor.update_actor(both, loss=policy_gradient())
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "states.py").write_text(RECIPE)
    return tmp_path / "states.py"


def test_a_graph_with_states_is_the_run_line_by_line(file: Path) -> None:
    metrics = check_recipe(file, steps=3)
    assert [row["seen/total"] for row in metrics] == [4.0, 8.0, 12.0]
    assert [row["buffer/sampled"] for row in metrics] == [0.0, 3.0, 3.0]
    assert [row["buffer/size"] for row in metrics] == [4.0, 6.0, 6.0]


def test_a_resumed_run_remembers_on_any_number_of_ranks_and_local_is_ray(
    launch_warm: Callable[..., Any], file: Path, data: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "few.jsonl"
    rows.write_text("".join(data.read_text().splitlines(keepends=True)[:6]))
    settings = (
        *(f"data.train.path={rows}", "actor.rollout.max_response_tokens=5", "placement=colocate"),
        *("reward.function=rlhf_dist.rewards:share_of_digits", "actor.optimizer.lr=1e-3"),
    )
    ray = ("placement.pools.main.slots=1", "actor.rollout.engine=transformers", "placement.host_processes=2")
    launch_warm(str(file), *settings, "steps=4", local=True, root=tmp_path / "whole")
    launch_warm(str(file), *settings, *ray, "steps=2", root=tmp_path / "ray")
    shutil.copytree(tmp_path / "ray", tmp_path / "two")
    launch_warm(str(file), *settings, *ray, "steps=4", "resume=auto", root=tmp_path / "ray")
    two = ("placement.pools.main.slots=2", *ray[1:])
    launch_warm(str(file), *settings, *two, "steps=4", "resume=auto", root=tmp_path / "two")
    ours, theirs, others = (read_metrics(tmp_path / root / "states") for root in ("whole", "ray", "two"))
    # Six prompts, four a step: the second step has the two that are left and two of a new epoch, one of them the same.
    assert [row["seen/kept"] for row in ours] == [4.0, 3.0, 0.0, 0.0]
    for key in ("seen/kept", "seen/total", "buffer/size", "buffer/sampled"):
        assert [row[key] for row in ours] == [row[key] for row in theirs] == [row[key] for row in others], key
    first, second, third = (weights(tmp_path / root / "states/models/actor") for root in ("whole", "ray", "two"))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert all(np.allclose(first[name], third[name], atol=1e-5) for name in first), "sums of two ranks round otherwise"


def test_what_an_op_lets_go_of_is_gone(file: Path) -> None:
    text = RECIPE.replace('"last": ""}', '"last": "", "once": np.ones(1)}')
    text = text.replace(
        "times, prompt = dict", 'assert ("once" in values) == (not values["total"])\n        times, prompt = dict'
    )
    short = text.replace('new = {"times": times, "total"', 'new = {"total"').replace(
        ', "lengths": lengths, "last": prompt}', "}"
    )
    short = short.replace('values["times"]', 'values.get("times", {})').replace('[values["lengths"], ', "[")
    for version in (text, short):  # the second goes on with numbers alone
        file.write_text(version)
        check_recipe(file, steps=2)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "buffer.sample(rows=3)",
            "buffer.sample(batch, rows=3)",
            r"buffer.sample takes no batch first, got TracedBatch",
        ),
        ("buffer.sample(rows=3)", "buffer.sampel(rows=3)", r"has no op 'sampel'; it has .*did you mean 'sample'"),
        ('seen.value("total")', 'seen.value("times")', r"starts without a number 'times'; it has total"),
        ('"last": prompt}', '"last": {1: 2}}', r"Seen cannot hold 'last' as it is: a checkpoint would give it back ch"),
        ('"last": prompt}', '"last": object()}', r"Seen cannot hold 'last', object: .*not JSON serializable; it holds"),
        (
            "keep=np.array(keep, int)",
            "parent=np.array(keep, int)",
            r"fresh returned parent=, which is for rows='derive'",
        ),
    ],
)
def test_what_a_state_cannot_be_is_said(file: Path, old: str, new: str, said: str) -> None:
    file.write_text(RECIPE.replace(old, new))
    with pytest.raises(CheckFailed, match=said):
        check_recipe(file, steps=1)
