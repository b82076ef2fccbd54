"""Infrastructure failures are named and bounded: a cluster too small, a worker that dies, a reward that raises."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from ray.util import placement_group_table

from controller.cluster.pool import ClusterError
from controller.cluster.start import Cluster
from controller.execution.failed_calls import NodeError, WorkerLost
from controller.lifecycle.run import run
from controller.record.display import Display
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


def reserved() -> int:
    """Placement groups that there are in the Ray that tests share."""
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def test_a_reward_that_raises_is_an_error_with_its_row_and_never_a_zero(
    launch: Callable[..., Any], tmp_path: Path
) -> None:
    before = reserved()
    file = tmp_path / "reward.py"
    file.write_text("def broken(prompt, response, answer):\n    raise KeyError('no such sum')\n")
    with pytest.raises(
        NodeError, match=r"reward.compute_reward \(step 0, grpo.py:\d+\).*broken for row \d.*no such sum"
    ):
        launch("grpo", *ROLLOUT, f"reward.function={file}:broken")
    deadline = time.monotonic() + 20
    while reserved() > before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert reserved() == before, "a Ray that was there before the run has its slots back"


class Picky(Exception):
    """One that pickle cannot make again."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")


def picky(prompt: str, response: str, answer: str) -> float:
    raise Picky(3, "bad luck")


USERS = """
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reward

def scaled(batch):
    return batch["nope"]

@host_op(reads=("rewards",), writes=("advantages",))
def broken(batch):
    return scaled(batch)

@recipe
def mine(prompts: Prompts, actor: Actor, reward: Reward) -> None:
    broken(reward.compute_reward(actor.generate_sequences(prompts)))
"""


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (
            REWARD,
            r"broken \(step 0, mine.py:\d+\) failed on rank 0: KeyError: .no column 'nope' in this batch.*; "
            r"at \S+mine.py:7 in scaled: return batch\[.nope.\], called from \S+mine.py:11 in broken: return scaled",
        ),
        (f"{__name__}:picky", r"on rank \d: .* picky for row 0 .* raised Picky: bad luck \(3\); at \S+:\d+ in picky"),
    ],
    ids=["host op", "reward"],
)
def test_a_users_error_names_its_line_and_the_log_with_the_whole_traceback(
    launch: Callable[..., Any], tmp_path: Path, reward: str, says: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USERS)
    with pytest.raises(NodeError, match=says) as caught:
        launch(str(file), *ROLLOUT, f"reward.function={reward}")
    assert not isinstance(caught.value, WorkerLost)
    log = re.search(r"whole traceback in (\S+/logs/host-\d.log)$", str(caught.value))
    assert log is not None and "Traceback (most recent call last)" in Path(log[1]).read_text()


def test_a_killed_worker_ends_the_run_naming_role_rank_and_step(
    cluster: None, model: Path, data: Path, tmp_path: Path
) -> None:
    settings = ["task=none", f"model.path={model}", f"data.train.path={data}", f"output.root={tmp_path}", *ROLLOUT]
    launch = compose(
        "grpo",
        [
            *settings,
            f"reward.function={REWARD}",
            "data.prompts_per_step=4",
            "steps=1000",
            "placement.pools.main.slots=2",
            "recovery.retries=0",
        ],
    )

    class Killer(Display):
        def step(self, step: int, metrics: Mapping[str, float], node_seconds: Mapping[str, float]) -> None:
            if step == 1:
                os.kill(pids["main"][1], signal.SIGKILL)

    pids: dict[str, tuple[int, ...]] = {}
    original = Cluster.add_pool

    def remembering(self: Cluster, name: str, pool: PoolConfig, team: int = 0) -> Any:
        made = original(self, name, pool, team)
        pids[name] = made.pids
        return made

    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, Killer("x", 1000, quiet=True) as display:
        patch.setattr(Cluster, "add_pool", remembering)
        with pytest.raises(
            WorkerLost,
            match=r"\(step \d+, .*\) failed on rank 1: its process \(pool main, rank 1, pid \d+ on node \S+\) "
            r"(was killed by signal 9 \(SIGKILL\)|ended, how is not known).*; see its log \S+main-1.log",
        ) as caught:
            run(launch, display)
    cause = caught.value.cause
    assert cause is not None and (cause.kind, cause.pool, cause.rank, cause.pid) == ("died", "main", 1, pids["main"][1])
    assert time.monotonic() - started < 120
