"""Syncs on real ranks: round trips of random layouts, and what happens when a rank fails.

Over gloo, and over a double that keeps NCCL's rules (strict.py): `strict` in the name of a link.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines.world import World
from tests.reshard import rank

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world4() -> Iterator[World]:
    world = World(4)
    yield world
    world.close()


LINKS = ["gloo", "strict"]


@pytest.mark.parametrize(
    ("first", "link"),
    [(0, "sockets"), (60, "sockets"), (120, "sockets"), (180, "shared"), (0, "strict"), (180, "strict shared")],
)
def test_round_trips_give_every_element_back(world4: World, first: int, link: str) -> None:
    assert world4.run(rank.round_trips, first, 60, link) == [[], [], [], []]


def sync(world: World, name: str, version: int, fault: str = "", at: int = -1, timeout_s: float = 20.0) -> list[Any]:
    return world.run(_sync, name, version, fault, at, timeout_s, SILENCE_S)


SILENCE_S = 8.0
"""Shorter than in earnest, so that the tests do not wait that long."""


def _sync(
    name: str, version: int, fault: str, at: int, timeout_s: float, silence_s: float = SILENCE_S
) -> dict[str, Any]:
    return rank.one_sync(name, version, fault=fault, at=at, timeout_s=timeout_s, silence_s=silence_s)


def assert_works(world: World, name: str, version: int, timeout_s: float = 20.0) -> None:
    for answer in sync(world, name, version, timeout_s=timeout_s):
        assert answer["equal"] and answer["received"] == answer["planned"]


@pytest.mark.parametrize("link", ["sockets again", "shared again", "strict again", "strict shared again"])
def test_a_sync_again_and_again(world4: World, link: str) -> None:
    for version in range(3):
        assert_works(world4, link, version)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("fault", ["corrupt", "swap"])
def test_a_shard_that_is_not_what_was_sent_fails_everywhere(world4: World, fault: str, link: str) -> None:
    name = f"{link} {fault}"
    answers = sync(world4, name, 1, fault, at=2)
    assert [answer["error"] for answer in answers] == ["SyncFailed"] * 4
    assert "on rank 2 1 parameters differ: layers.0.q_proj" in answers[2]["says"]
    assert all("failed on ranks [2]" in answers[k]["says"] for k in (0, 1, 3))
    assert_works(world4, name, 2)


@pytest.mark.parametrize("link", LINKS)
def test_ranks_that_disagree_on_the_version_all_say_so(world4: World, link: str) -> None:
    name = f"{link} versions"
    for answer in sync(world4, name, 5, "other version", at=1):
        assert "all ranks must sync one version, got rank 0: 5, rank 1: 6, rank 2: 5" in answer["says"]
    assert_works(world4, name, 6)


@pytest.mark.parametrize("link", LINKS)
def test_a_trained_version_with_the_old_bits_is_an_error(world4: World, link: str) -> None:
    name = f"{link} stale"
    assert_works(world4, name, 1)
    for answer in sync(world4, name, 1, "trained nothing"):
        assert "must differ from it in some weight" in answer["says"]
    assert all(answer["equal"] for answer in sync(world4, name, 2, "trained nothing"))


@pytest.mark.parametrize("link", LINKS)
def test_an_error_inside_ends_the_sync_on_all_ranks_at_once(world4: World, link: str) -> None:
    name = f"{link} error"
    answers = sync(world4, name, 1, "error inside", at=3)
    assert "no memory left" in answers[3]["says"]
    for answer in answers[:3]:
        assert answer["error"] == "SyncStopped" and answer["seconds"] < 5
        assert "waiting for rank 3" in answer["says"] and "no memory left" in answer["says"]
    assert_works(world4, name, 1)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("stall before", "before"),
        ("stall inside", "inside"),
        ("stall inside", "shared inside"),
        ("stall before", "strict before"),
        ("stall inside", "strict inside"),
        ("stall inside", "strict shared inside"),
    ],
)
def test_a_rank_that_stalls_is_named_within_the_time_out_and_a_retry_succeeds(
    world4: World, fault: str, name: str
) -> None:
    answers = sync(world4, name, 1, fault, at=1, timeout_s=3.0)
    for k in (0, 2, 3):
        assert answers[k]["error"] == "SyncStopped" and answers[k]["seconds"] < 4.5
    assert "error" in answers[1]  # it comes back to find the others gone
    if fault == "stall inside":
        says = answers[0]["says"]
        what = "handles of shared buffers" if "shared" in name else "parameters layers.0"
        assert "phase 'exchange'" in says and "rank 0 waiting for rank 1" in says and what in says
    else:
        assert (
            "phase 'meet'" in answers[0]["says"] and "waiting for rank 1: not there within 3.0 s" in answers[0]["says"]
        )
    retried = sync(world4, name, 1, timeout_s=3.0)
    assert all(answer.get("equal") for answer in retried), retried


@pytest.mark.parametrize(("link", "at"), [("gloo", 1), ("strict", 0)])
def test_a_rank_that_is_stopped_is_named_long_before_the_deadline_and_a_retry_succeeds(
    world4: World, link: str, at: int
) -> None:
    """Rank 0 hosts the store besides: what the others would tell each other is stopped with it."""
    name, started = f"{link} stopped {at}", time.monotonic()
    assert_works(world4, name, 1, 60.0)
    for pipe in world4._pipes:
        pipe.send((_sync, (name, 2, "stop inside", at, 60.0, SILENCE_S)))
    try:
        for k in set(range(4)) - {at}:
            assert world4._pipes[k].poll(50), f"rank {k} still waits after {time.monotonic() - started:.0f} s"
            done, answer = world4._pipes[k].recv()
            assert done and answer["error"] == "SyncStopped" and answer["seconds"] < 55.0, answer
            assert f"rank {k} waiting for rank {at}, " in answer["says"] and "parameters layers.0" in answer["says"]
    finally:
        os.kill(world4._processes[at].pid or 0, signal.SIGCONT)
    assert world4._pipes[at].poll(70) and "error" in world4._pipes[at].recv()[1]
    assert_works(world4, name, 3, 60.0)


def test_a_rank_that_dies_is_an_error_on_every_survivor() -> None:
    world = World(4)
    try:
        assert_works(world, "alive", 1, 3.0)
        for pipe in world._pipes:
            pipe.send((_sync, ("alive", 2, "die inside", 1, 3.0)))
        for k in (0, 2, 3):
            assert world._pipes[k].poll(6), f"rank {k} hangs"
            done, answer = world._pipes[k].recv()
            assert done and answer["error"] == "SyncStopped" and answer["seconds"] < 4.5, answer
    finally:
        world.close()
