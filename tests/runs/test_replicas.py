"""Replicas of a pool that generates come and go while a run goes on, to the weights of a run where none did."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from controller.execution.ray_runner import RayRunner
from controller.lifecycle.scaling import Answer, NotScaled, ask
from rlhf_dist.dataflow.graph import Node
from tests.runs.test_recovery import SETTINGS, Killer, comparable, same_weights
from tests.runs.warm_cluster import WarmCluster

APART = ("placement.pools.main.slots=1", "placement.pools.gen.slots=2", "placement.rollout=gen")
SHORT = ("steps=3", "output.checkpoint_every=0", "output.evaluate_every=0", *APART)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs."""
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture
def start(launch_warm: Callable[..., Any], folder: Path) -> Callable[..., dict[str, Any]]:
    """A run into folder/NAME/grpo."""
    return lambda name, *overrides: launch_warm("grpo", *SETTINGS, *SHORT, *overrides, root=folder / name)


@pytest.fixture
def calm(start: Callable[..., dict[str, Any]], folder: Path) -> Path:
    """A run that nothing disturbs, made once."""
    if not (folder / "calm").exists():
        start("calm")
    return folder / "calm/grpo"


def assert_same(calm: Path, other: Path) -> None:
    """Weights to the last bit, and metrics; one is summed in the order in which replicas answer."""
    assert same_weights(calm / "models/actor", other / "models/actor")
    for expected, found in zip(comparable(calm), comparable(other), strict=True):
        assert found.pop("reward/reward_std") == pytest.approx(expected.pop("reward/reward_std"))
        assert found == expected


@pytest.mark.timeout(900)
def test_rows_of_a_dead_replica_go_to_the_other_and_another_serves_after_the_next_sync(
    start: Callable[..., dict[str, Any]], warm: WarmCluster, monkeypatch: pytest.MonkeyPatch, folder: Path, calm: Path
) -> None:
    killer = Killer(monkeypatch, warm)
    killer.at = {("actor.generate_sequences", 1): ("gen", 1)}
    shaken = start("shaken")
    ((one),) = shaken["recoveries"]
    assert (one["from"], one["pools"], one["failed_at"], one["back_to"]) == ("replicas", ["gen"], 1, 2)
    assert "killed by signal 9" in one["what"]
    assert_same(calm, folder / "shaken/grpo")
    assert {name: len(pids) for name, pids in killer.seen.items()} == {"host": 1, "main": 1, "gen": 3}


@pytest.mark.timeout(900)
def test_a_pool_that_generates_grows_and_shrinks_while_a_run_goes(
    start: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, folder: Path, calm: Path
) -> None:
    sizes: dict[int, int] = {}
    answers: list[Answer] = []
    launch = RayRunner.launch

    def asked(replicas: int) -> threading.Thread:
        asking = threading.Thread(target=lambda: answers.append(ask(folder / "scaled/grpo", "gen", replicas, 300.0)))
        asking.start()
        while not (folder / "scaled/grpo/scale.json").exists():
            time.sleep(0.01)
        return asking

    def launching(runner: RayRunner, node: Node, step: int) -> None:
        if node.name == "actor.generate_sequences":
            sizes[step] = runner.groups["actor.rollout"].pool.size
        if node.name == "actor.update_actor" and step < 2:
            threads.append(asked(3 if step == 0 else 1))
        launch(runner, node, step)

    threads: list[threading.Thread] = []
    monkeypatch.setattr(RayRunner, "launch", launching)
    start("scaled")
    for thread in threads:
        thread.join(10.0)
    assert sizes == {0: 2, 1: 3, 2: 1} and all(one.done for one in answers), answers
    assert_same(calm, folder / "scaled/grpo")
    assert not list((folder / "scaled/grpo").glob("scale*"))


def test_a_run_that_is_over_is_not_asked(tmp_path: Path) -> None:
    with pytest.raises(NotScaled, match="no run under way"):
        ask(tmp_path, "gen", 2, 1.0)
