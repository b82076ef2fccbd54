"""A process is killed in the middle of an operation: the run goes on by itself, to the same weights."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.execution.ray_runner import RayRunner, WorkerLost
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
    """Lines of metrics.jsonl without what a clock has measured."""
    clocks = ("time_s/", "store/", "recover")
    timed = ("_s", "_seconds", "per_s", "step_s")
    return [
        {name: value for name, value in row.items() if not name.startswith(clocks) and not name.endswith(timed)}
        for row in read_metrics(folder)
    ]


def test_kills_in_colocated_pools(
    launch_warm: Callable[..., Any], killer: Killer, tmp_path: Path, data: Path
) -> None:
    settings = (*SETTINGS, f"data.heldout.path={data}")
    calm = launch_warm("grpo", *settings, root=tmp_path / "calm")
    killer.at = {("actor.update_actor", 3): ("main", 1), ("actor.generate_sequences", 1): ("main", 0)}
    killer.seen.clear()
    shaken = launch_warm("grpo", *settings, root=tmp_path / "shaken")
    assert not killer.at
    print([(one["back_to"], one["from"], one["seconds"], one["what"][:120]) for one in shaken["recoveries"]])
    assert [(one["back_to"], one["from"]) for one in shaken["recoveries"]] == [(0, "start"), (2, "checkpoint")]
    assert same_weights(tmp_path / "calm/grpo/models/actor", tmp_path / "shaken/grpo/models/actor")
    assert comparable(tmp_path / "calm/grpo") == comparable(tmp_path / "shaken/grpo")
    assert len(killer.seen["host"]) == 1, "the other pool kept its process"
