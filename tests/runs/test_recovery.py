"""A process is killed in the middle of an operation: the run goes on by itself, to the same weights."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.execution.ray_runner import RayRunner
from controller.record.metrics import read_metrics
from rlhf_dist.dataflow.graph import Node
from tests.runs.digit_reward import digits
from tests.runs.test_recipes import weights
from tests.runs.warm_cluster import WarmCluster

REWARD = f"{Path(__file__).parent}/digit_reward.py:{digits.__name__}"
SETTINGS = (
    "actor.rollout.engine=transformers",
    "actor.rollout.max_response_tokens=8",
    f"reward.function={REWARD}",
    "actor.optimizer.lr=1e-3",
    "steps=4",
    "output.checkpoint_every=2",
    "output.evaluate_every=2",
    "placement.pools.main.slots=2",
)
SEPARATE = ("placement.pools.gen.slots=1", "placement.rollout=gen")


class Killer:
    """SIGKILLs one rank of a pool once a node of a step has been sent to it."""

    def __init__(self, patch: pytest.MonkeyPatch, warm: WarmCluster) -> None:
        self.at: dict[tuple[str, int], tuple[str, int]] = {}
        """Node and step -> pool and rank."""
        self.seen: dict[str, set[int]] = {}
        """Pool -> process ids of all ranks that were ever called."""
        launch, self.warm = RayRunner.launch, warm

        def launching(runner: RayRunner, node: Node, step: int) -> None:
            launch(runner, node, step)
            for name, pool in warm.pools.items():
                self.seen.setdefault(name, set()).update(pool.pids)
            if (found := self.at.pop((node.name, step), None)) is not None:
                time.sleep(0.02)
                os.kill(warm.pools[found[0]].pids[found[1]], signal.SIGKILL)

        patch.setattr(RayRunner, "launch", launching)


@pytest.fixture
def killer(warm: WarmCluster, monkeypatch: pytest.MonkeyPatch) -> Killer:
    return Killer(monkeypatch, warm)


def same_weights(one: Path, other: Path) -> bool:
    found, expected = weights(one), weights(other)
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


def comparable(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what a clock has measured; what combines in the order of arrival, to 12 digits."""
    clocks = ("time_s/", "store/", "recover", "memory_copy")
    timed = ("_s", "_seconds", "per_s", "step_s")
    return [
        {
            name: float(f"{value:.12g}") if name.endswith("_std") else value
            for name, value in row.items()
            if not name.startswith(clocks) and not name.endswith(timed)
        }
        for row in read_metrics(folder)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs, with held-out rows."""
    made = tmp_path_factory.mktemp("recovery")
    rows = [{"prompt": f"{a}+{a}0=", "answer": str(11 * a)} for a in range(4)]
    (made / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


@pytest.fixture
def start(launch_warm: Callable[..., Any], folder: Path) -> Callable[..., dict[str, Any]]:
    """A run into folder/NAME."""
    settings = (*SETTINGS, f"data.heldout.path={folder}/heldout.jsonl")
    return lambda name, *overrides: launch_warm("grpo", *settings, *overrides, root=folder / name)


def told(summary: dict[str, Any]) -> list[tuple[int, str, list[str]]]:
    print([(one["seconds"], one["what"]) for one in summary["recoveries"]])
    return [(one["back_to"], one["from"], one["pools"]) for one in summary["recoveries"]]


@pytest.mark.timeout(900)
def test_a_colocated_pool_goes_on_from_copies_in_memory(
    start: Callable[..., dict[str, Any]], killer: Killer, folder: Path
) -> None:
    assert "recoveries" not in start("calm")
    calm = folder / "calm/grpo"
    killer.at = {("actor.update_actor", 3): ("main", 1)}
    killer.seen.clear()
    shaken = start("colocated", "recovery.memory_every=1", "output.checkpoint_every=0")
    assert told(shaken) == [(3, "memory", ["main"])]
    assert same_weights(calm / "models/actor", folder / "colocated/grpo/models/actor")
    assert comparable(calm) == comparable(folder / "colocated/grpo")
    assert len(killer.seen["host"]) == 1, "the other pool kept its process"


@pytest.mark.timeout(900)
def test_each_of_three_pools_dies_and_the_others_keep_their_processes(
    start: Callable[..., dict[str, Any]], killer: Killer, folder: Path
) -> None:
    start("calm_apart", *SEPARATE)
    calm = folder / "calm_apart/grpo"
    killer.at = {
        ("reward.compute_reward", 1): ("host", 0),
        ("actor.update_actor", 3): ("main", 0),
        ("actor.generate_sequences", 3): ("gen", 0),
    }
    killer.seen.clear()
    shaken = start("separate", *SEPARATE)
    assert told(shaken) == [(1, "processes", ["host"]), (3, "processes", ["gen"]), (2, "checkpoint", ["main"])]
    assert same_weights(calm / "models/actor", folder / "separate/grpo/models/actor")
    assert comparable(calm) == comparable(folder / "separate/grpo")
    assert {name: len(pids) for name, pids in killer.seen.items()} == {"host": 2, "main": 4, "gen": 2}
