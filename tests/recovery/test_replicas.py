"""Rows of a replica that died go to the others, each once, and every call has a reply in the end."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.cluster.local import Local
from controller.cluster.pool import NoRoom, Pool
from controller.cluster.reservations import Reservations
from controller.execution.failed_calls import WorkerLost
from controller.execution.looking import Looking
from controller.execution.replicas import hand_over, living
from controller.execution.simulated_workers import SimulatedWorkers
from controller.execution.worker_group import Shards, WorkerGroup
from controller.lifecycle.replicas import DeadReplicas
from controller.lifecycle.session import Session
from recipes.policy_gradient.ppo import ppo
from rlhf_dist.compose import compose
from rlhf_dist.config import PoolConfig, RayConfig
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.wire import Call, Reply


def shards_of(rows: int, copies: int, team: int) -> tuple[Shards, list[int]]:
    """As a node that generates is cut, and the part that each of its calls has."""
    parts = tuple(np.array_split(np.arange(rows), copies))
    made = Shards(parts=parts, answering=tuple(range(0, copies * team, team)), part_of_answer=tuple(range(copies)))
    return made, [call // team for call in range(copies * team)]


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(2, 5), st.integers(1, 2), st.integers(0, 40))
def test_however_many_die_one_after_the_other_each_row_has_one_call_of_a_living_replica(
    data: st.DataObject, copies: int, team: int, rows: int
) -> None:
    shards, part_of_call = shards_of(rows, copies, team)
    pool = Pool("gen", tuple(range(copies * team)), team=team)
    rank_of_call = list(range(copies * team))
    tokens, dead = np.arange(rows) + 1, set[int]()
    for first in data.draw(st.lists(st.sampled_from(range(copies)), max_size=copies - 1, unique=True)):
        dead |= set(range(first * team, (first + 1) * team))
        lost = [call for call, rank in enumerate(rank_of_call) if rank in dead]
        shards, pieces = hand_over(shards, part_of_call, lost, living(pool, dead), tokens)
        for piece in pieces:
            for call, rank in zip(piece.calls, piece.ranks, strict=True):
                if call == len(rank_of_call):
                    rank_of_call.append(rank)
                    part_of_call.append(piece.part)
                assert part_of_call[call] == piece.part
                rank_of_call[call] = rank
    assert not set(rank_of_call) & dead
    assert sorted(np.concatenate(shards.parts).tolist()) == list(range(rows))
    answered = [part_of_call[call] for call in shards.answering]
    assert answered == list(shards.part_of_answer) and sorted(answered) == list(range(len(shards.parts)))
    for part in range(len(shards.parts)):
        ranks = [rank for call, rank in enumerate(rank_of_call) if part_of_call[call] == part]
        assert ranks == list(range(ranks[0], ranks[0] + team)), "one replica has it, each of its ranks once"


def test_the_rows_of_a_dead_replica_are_spread_by_their_tokens() -> None:
    shards, part_of_call = shards_of(8, 4, 1)
    tokens = np.array([9, 1, 1, 1, 1, 1, 1, 1])
    after, pieces = hand_over(shards, part_of_call, [0], [(1,), (2,), (3,)], tokens)
    assert [piece.ranks for piece in pieces] == [(1,), (2,)], "it had two rows"
    assert [after.parts[piece.part].tolist() for piece in pieces] == [[0], [1]]


def covered(recipe: str, *overrides: str) -> bool:
    said = ("model.path=/m", "task=addition", "placement.pools.main.slots=1", "placement.pools.gen.slots=2")
    launch = compose(recipe, [*said, "placement.rollout=gen", *overrides])
    found = DeadReplicas(Session(launch, Local(1.0), {}, {}), lambda error: 0, print, print)
    return found.covers(Pool("gen", (None, None), team=1))


def test_only_a_pool_of_one_role_that_learns_is_synced_in_every_step() -> None:
    assert covered("grpo")
    assert not covered("nash_md"), "the sync of one role says nothing of the other's weights"
    assert not covered("nash_md", "placement.pools.own.slots=1", "placement.rollout={actor: own, reference: gen}")


@dataclass
class Dead:
    """Implements `Replicas`: these ranks, from the start."""

    ranks: Collection[int]

    def covers(self, pool: Pool) -> bool:
        return True

    def dead(self, pool: str) -> Collection[int]:
        return self.ranks if pool == "gen" else ()

    def lost(self, pool: Pool, ranks: Sequence[int], rows: int, error: WorkerLost) -> None:
        raise error

    def mend(self, pool: str) -> Mapping[str, WorkerGroup]:
        return {}

    def synced(self, pool: str, steps_done: int) -> None:
        """Nobody asks."""


class Listening(SimulatedWorkers):
    """Keeps the calls."""

    calls: list[Call]

    def reply(self, call: Call) -> Reply:
        self.calls.append(call)
        return super().reply(call)


def test_calls_that_others_take_over_keep_their_inputs_like_any(tmp_path: Path) -> None:
    workers = Listening(
        trace(ppo), prompts=8, prompt_tokens=4, response_tokens=lambda random, rows: random.integers(1, 9, rows)
    )
    workers.calls = []
    runner = workers.runner({"actor": ("gen", 4)})
    runner.groups = {**runner.groups, "actor": WorkerGroup("actor", Pool("gen", workers._processes(4), team=1))}
    runner._replicas, runner.calls.looking = Dead({3}), Looking(folder=tmp_path, every=1, profiled=[0])
    for name in ("prompts", "actor.generate_sequences"):
        runner.run_node(workers.dataflow[name], 0)
    looks = [call.look for call in workers.calls if call.node == "actor.generate_sequences"]
    kept = [look for look in looks if look is not None and look.due]
    assert all(look is not None and look.profile for look in looks)
    assert sorted(look.part for look in kept) == list(range(len(kept))), "one writes each part"


def test_slots_of_the_dead_are_waited_for_as_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    start = pytest.importorskip("controller.cluster.start")
    waited = list[float | None]()

    def full(self: Reservations, *about: object) -> None:
        waited.append(about[5] if len(about) > 5 and isinstance(about[5], float) else None)
        raise NoRoom("full")

    monkeypatch.setattr(Reservations, "take", full)
    monkeypatch.setattr(start.Cluster, "_slot", lambda self, pool: {"CPU": 1.0})  # both would start Ray
    monkeypatch.setattr(start, "_kill", list)
    cluster = start.Cluster(RayConfig(), slots=2, host_processes=1)
    for slots, dead in ((3, ()), (2, (1,))):
        cluster.pools["gen"] = Pool("gen", (None, None), team=1, bundles=((0, 0), (1, 0)))
        with pytest.raises(NoRoom):
            cluster.change_pool("gen", PoolConfig(slots=slots), dead)
    assert waited == [start.ROOM_S, None]
