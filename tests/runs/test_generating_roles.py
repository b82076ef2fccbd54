"""Several roles generate in one recipe, several learn: the same numbers in one process, on Ray, and in any pools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.record.metrics import read_metrics
from tests.runs.test_recipes import REWARD, weights

Launch = Callable[..., dict[str, Any]]

DUEL = """
from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Opponent, Prompts, Reward


@host_op(reads=("rewards", "rival_rewards", "response_mask"), writes=("advantages",))
def lead(batch):
    mask = batch["response_mask"]
    ahead = batch["rewards"].values - batch["rival_rewards"].values
    return Batch({"advantages": Column(ahead.repeat(mask.lengths), mask.offsets)})


@recipe
def duel(prompts: Prompts, actor: Actor, opponent: Opponent, reward: Reward) -> None:
    theirs = reward.compute_reward(opponent.generate_sequences(prompts))
    ours = reward.compute_reward(actor.generate_sequences(prompts, n=2))
    actor.compute_log_prob(theirs)
    ours = lead(actor.compute_log_prob(ours).join(theirs, rival_rewards="rewards"))
    actor.update_actor(ours, loss=ppo_clip(0.2))
"""

PAIR = """
from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reward
from rlhf_dist.transforms import rloo_advantage


@recipe
def pair(prompts: Prompts, first: Actor, second: Actor, reward: Reward) -> None:
    for player in (first, second):
        batch = reward.compute_reward(player.generate_sequences(prompts, n=2))
        player.update_actor(rloo_advantage(player.compute_log_prob(batch)), loss=ppo_clip(0.2))
"""

ONE_SLOT = ("placement.pools.main.slots=1", f"reward.function={REWARD}", "steps=3")
APART = ("placement.pools.other.slots=1", "placement.pools.third.slots=1")


def same(one: Path, other: Path, recipe: str, roles: tuple[str, ...]) -> None:
    for role in roles:
        mine, its = (weights(folder / recipe / "models" / role) for folder in (one, other))
        assert mine and mine.keys() == its.keys()
        assert all(np.array_equal(mine[name], its[name]) for name in mine), f"{role} of {other.name}"
    shown = ("reward", "opponent/response_tokens", "actor/rollout_mismatch")
    rows = [
        [{key: value for key, value in row.items() if key.startswith(shown)} for row in read_metrics(folder / recipe)]
        for folder in (one, other)
    ]
    assert rows[0] and rows[0] == rows[1], other.name


def test_an_actor_plays_a_frozen_opponent(launch_warm: Launch, tmp_path: Path, tied: Path) -> None:
    """About 25 s."""
    file = tmp_path / "duel.py"
    file.write_text(DUEL)
    settings = (*ONE_SLOT, f"opponent.model.path={tied}", "actor.optimizer.lr=1e-2")
    for role, tokens, temperature in (("actor", 8, 1.0), ("opponent", 4, 0.5)):
        settings += (f"{role}.rollout.engine=transformers", f"{role}.rollout.max_response_tokens={tokens}")
        settings += (f"{role}.rollout.temperature={temperature}",)
    summary = launch_warm(str(file), *settings, local=True, root=tmp_path / "local")
    assert summary["last"]["opponent/longest_response"] <= 4 < summary["last"]["actor/longest_response"] <= 8
    assert summary["last"]["actor/rollout_mismatch"] > 0.1, "the opponent's rows are no sample of the actor's"
    assert summary["last"]["actor#2/rollout_mismatch"] < 1e-4, "its own rows are"
    assert not (tmp_path / "local/duel/models/opponent").exists(), "it never learns"
    launch_warm(str(file), *settings, root=tmp_path / "ray")
    apart = ("placement.rollout.opponent=other", "placement.rollout.actor=third")
    launch_warm(str(file), *settings, *APART, *apart, root=tmp_path / "apart")
    for way in ("ray", "apart"):
        same(tmp_path / "local", tmp_path / way, "duel", ("actor",))


def test_two_actors_learn_each_in_its_pool_or_together(launch_warm: Launch, tmp_path: Path, tied: Path) -> None:
    """About 25 s."""
    file = tmp_path / "pair.py"
    file.write_text(PAIR)
    settings = (*ONE_SLOT, f"second.model.path={tied}", "second.rollout.temperature=0.7")
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "12+3=", "answer": "15"}')
    settings += (f"data.heldout.path={tmp_path}/heldout.jsonl",)
    for role in ("first", "second"):
        settings += (f"{role}.rollout.engine=transformers", f"{role}.rollout.max_response_tokens=6")
        settings += (f"{role}.optimizer.lr=1e-2",)
    summary = launch_warm(str(file), *settings, local=True, root=tmp_path / "local")
    evaluated = {name for name in summary["evaluations"][-1] if name.endswith("/reward")}
    assert evaluated == {"heldout/first/reward", "heldout/second/reward"}
    assert (tmp_path / "local/pair/rollouts/heldout/second/step_000003.parquet").is_file()
    launch_warm(str(file), *settings, root=tmp_path / "together")
    apart = ("placement.roles.second=other", "placement.rollout.first=third")
    launch_warm(str(file), *settings, *APART, *apart, root=tmp_path / "apart")
    for way in ("together", "apart"):
        same(tmp_path / "local", tmp_path / way, "pair", ("first", "second"))
    started = {role: weights(tmp_path / f"local/pair/models/{role}") for role in ("first", "second")}
    assert started["first"].keys() != started["second"].keys(), "each has its own model"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["placement.rollout.rival=main"], "placement.rollout: unknown role that generates rival; there is"),
        (["placement.rollout.actor=man"], "placement.rollout: unknown pool man; did you mean main?"),
        (
            ["opponent.rollout.tensor_parallel=2", "placement.pools.main.slots=2"],
            "opponent.rollout.tensor_parallel must be that of actor in the same pool 'main', 1, got 2",
        ),
        (["opponent.rollout.temperature=0"], "opponent.rollout.temperature must be above 0, got 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    model: Path, data: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    from rlhf_dist.checks import check_launch
    from rlhf_dist.compose import compose

    file = tmp_path / "duel.py"
    file.write_text(DUEL)
    settings = ["task=none", f"model.path={model}", f"data.train.path={data}", f"reward.function={REWARD}"]
    with pytest.raises(ValueError, match=message):
        check_launch(compose(str(file), [*settings, *overrides]))


COUNTING = """
from dataclasses import dataclass

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import FunctionConfig
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Function, Prompts, op
from rlhf_dist.transforms import rloo_advantage


@dataclass(frozen=True, kw_only=True)
class CounterConfig(FunctionConfig):
    word: str = "7"


class CounterWorker:
    def __init__(self, context, config):
        assert context.role == "counter" and isinstance(config, CounterConfig)
        self.word = config.word

    def count(self, batch, call, *, scale):
        counts = [scale * batch["response"].row(row).count(self.word) for row in range(batch.num_rows)]
        return Batch({"rewards": Column.dense(counts, dtype="float32")}, batch.num_rows)


class Counter(Function):
    settings, worker = CounterConfig, CounterWorker

    @op(reads=("response",), writes=("rewards",), streams=True)
    def count(self, batch, *, scale: float = 1.0):
        ...


@recipe
def counting(prompts: Prompts, actor: Actor, counter: Counter) -> None:
    batch = counter.count(actor.generate_sequences(prompts, n=4), scale=0.5)
    actor.update_actor(rloo_advantage(actor.compute_log_prob(batch)), loss=ppo_clip(0.2))
"""


def test_a_kind_of_role_of_the_users_own_travels_by_value(launch_warm: Launch, tmp_path: Path) -> None:
    """About 12 s."""
    file = tmp_path / "counting.py"
    file.write_text(COUNTING)
    settings = ("actor.rollout.engine=transformers", "actor.rollout.max_response_tokens=6", "counter.word=1")
    settings += ("placement.pools.main.slots=1", "placement.host_processes=2")
    launch_warm(str(file), *settings, local=True, root=tmp_path / "local")
    launch_warm(str(file), *settings, root=tmp_path / "ray")
    same(tmp_path / "local", tmp_path / "ray", "counting", ("actor",))
