"""Infrastructure failures are named and bounded: a cluster too small, a worker that dies, a reward that raises."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from controller.cluster import Cluster, ClusterError
from controller.display import Display
from controller.ray_runner import NodeError, WorkerLost
from controller.run import run
from rlhf_dist.compose import compose
from rlhf_dist.config import PoolConfig, RayConfig
from tests.runs.digit_reward import digits

REWARD = f"{Path(__file__).parent}/digit_reward.py:{digits.__name__}"
ROLLOUT = ("actor.rollout.engine=transformers", "actor.rollout.max_response_tokens=8")


def test_a_pool_that_cannot_be_placed_names_what_is_free_where(cluster: None) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"pool 'big' needs 50 slots of 1 CPU.*free: .*\d+ CPU, 0 GPU"):
        with Cluster(RayConfig(ready_timeout_s=2.0), slots=50, host_processes=1) as small:
            small.add_pool("big", PoolConfig(slots=50))
    assert time.monotonic() - started < 20


def test_a_reward_that_raises_is_an_error_with_its_row_and_never_a_zero(
    launch: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "reward.py"
    file.write_text("def broken(prompt, response, answer):\n    raise KeyError('no such sum')\n")
    with pytest.raises(
        NodeError, match=r"reward.compute_reward \(step 0, grpo.py:\d+\).*broken for row \d.*no such sum"
    ):
        launch("grpo", *ROLLOUT, f"reward.function={file}:broken")


def test_a_killed_worker_ends_the_run_naming_role_rank_and_step(
    cluster: None, model: Path, data: Path, tmp_path: Path
) -> None:
    settings = ["task=none", f"model.path={model}", f"data.train.path={data}", f"output.root={tmp_path}", *ROLLOUT]
    launch = compose("grpo", [*settings, f"reward.function={REWARD}", "data.prompts_per_step=4", "steps=1000"])

    class Killer(Display):
        def step(self, step: int, metrics: Mapping[str, float], node_seconds: Mapping[str, float]) -> None:
            if step == 1:
                os.kill(pids["main"][1], signal.SIGKILL)

    pids: dict[str, tuple[int, ...]] = {}
    original = Cluster.add_pool

    def remembering(self: Cluster, name: str, pool: PoolConfig) -> Any:
        made = original(self, name, pool)
        pids[name] = made.pids
        return made

    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, Killer("x", 1000, quiet=True) as display:
        patch.setattr(Cluster, "add_pool", remembering)
        with pytest.raises(WorkerLost, match=r"\(step \d+, .*\) failed on rank \d: its process died"):
            run(launch, display)
    assert time.monotonic() - started < 120
