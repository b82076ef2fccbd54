"""Rewards inside a run: every shipped one, in the process that a run gives it, and users' own in whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from controller.cluster.start import worker_actor
from controller.record.metrics import read_metrics
from rlhf_dist import rewards
from rlhf_dist.batch import Batch, Column
from rlhf_dist.rewards.child import Limits
from rlhf_dist.rewards.load import load_reward
from rlhf_dist.rewards.reasoning_gym import answer_json
from rlhf_dist.wire import Call, Fetch
from workers.process import WorkerProcess

ENTRY = json.loads(answer_json("chain_sum", {"answer": "3", "question": "1 + 2 =", "metadata": {}}))
SHIPPED = {
    "rlhf_dist.rewards:code_tests": ('["assert f() == 3"]', "def f(): return 3", "def f(): return 4"),
    "rlhf_dist.rewards:code_solved": ("assert f() == 3", "def f(): return 3", "no code"),
    "rlhf_dist.rewards:json_match": ("[1, 2]", "[1,2]", "[2,1]"),
    "rlhf_dist.rewards:valid_json": ("", "{}", "{"),
    "rlhf_dist.rewards:exact_match": ("3", "3", "4"),
    "rlhf_dist.rewards:math_verify": ("$3$", "It is $\\frac{6}{2}$", "$4$"),
    "rlhf_dist.rewards:reasoning_gym": (json.dumps(ENTRY), "It is 3", "It is nothing"),
    "rlhf_dist.rewards:reasoning_gym_solved": (json.dumps(ENTRY), "It is 3", "It is 4"),
    "rlhf_dist.rewards:share_of_digits": ("3", "33", "It is 3"),
}
"""Reward -> an answer, a response that is right and one that is wrong."""
ROLLOUT = (
    *("actor.rollout.engine=transformers", "actor.rollout.max_response_tokens=4", "output.save_model=false"),
    *("placement.pools.main.slots=1", "algorithm.kl_coef=0"),
)
OWN = """
import asyncio, os

class Scores:
    async def __call__(self, solution_str, ground_truth, policy_version, finished):
        await asyncio.sleep(0.2)
        assert len(policy_version) == 4 or finished
        return {"score": float(len(solution_str)), "versions": float(max(policy_version))}

def exits(response):
    os._exit(9)
"""


@pytest.fixture(scope="module")
def process(cluster: None) -> Iterator[Any]:
    started = worker_actor(WorkerProcess).remote("host", 0, 1, None)
    yield started
    ray.get(started.close.remote(), timeout=30)
    ray.kill(started)


@pytest.mark.parametrize("spec", SHIPPED)
def test_every_shipped_reward_works_in_a_worker(spec: str, process: Any) -> None:
    answer, right, wrong = SHIPPED[spec]
    texts = {"prompt": ["1+2="] * 2, "response": [right, wrong], "answer": [answer] * 2}
    stored = ray.put(Batch({name: Column.strings(rows) for name, rows in texts.items()}))
    object_of, row_of = np.zeros(2, np.int32), np.arange(2, dtype=np.int32)
    fetch = Fetch({name: (name,) for name in texts}, (stored,), object_of, row_of)
    settings = {"function": load_reward(spec), "limits": Limits(timeout_s=60.0), "failed_reward": None}
    ray.get(
        process.host_role.remote("reward", "workers.rule_reward:RuleRewardWorker", settings, {"seed": 0}), timeout=120
    )
    call = Call(step=0, node="reward", line="", seed=0, num_rows=2, fetches=(fetch,))
    reply = ray.get(process.call.remote("reward", "compute_reward", call), timeout=120)
    ((_, columns),) = reply.stored
    right_reward, wrong_reward = ray.get(columns)["rewards"].values.tolist()
    assert right_reward == 1.0 and wrong_reward < 1.0


def test_no_shipped_reward_is_left_out() -> None:
    functions = {name for name in rewards.__all__ if f"rlhf_dist.rewards:{name}" in SHIPPED}
    makers = {"CodeTests", "has_format", "in_length", "regex_match", "weighted"}
    assert set(rewards.__all__) - functions - makers == {
        "RewardFunctionError", "adapt", "load_function", "load_reward", "rule_rewards"
    }  # fmt: skip


def test_the_maths_reward_works_in_a_run(launch_warm: Callable[..., Any], tmp_path: Path) -> None:
    rows = tmp_path / "maths.jsonl"
    rows.write_text('{"prompt": "1+0=", "answer": "$1$"}\n' * 4)
    spec = "reward.function=rlhf_dist.rewards:math_verify"
    launch_warm("grpo", *ROLLOUT, spec, f"data.train.path={rows}", "steps=1")
    (metrics,) = read_metrics(tmp_path / "grpo")
    assert 0.0 <= metrics["reward/reward"] <= 1.0 and metrics["reward/score/timed_out"] == 0.0


def test_an_async_class_and_any_column_by_name(launch_warm: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    launch_warm("grpo", *ROLLOUT, f"reward.function={file}:Scores", "steps=1")
    (metrics,) = read_metrics(tmp_path / "grpo")
    assert metrics["reward/score/versions"] == 0.0 and 0.0 <= metrics["reward/reward"] <= 4.0


def test_a_reward_that_ends_its_process_is_counted_where_that_was_asked_for(
    launch_warm: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "own_exit.py"
    file.write_text(OWN)
    settings = (*ROLLOUT, f"reward.function={file}:exits", "steps=1", "algorithm.samples_per_prompt=2")
    launch_warm("grpo", *settings, "data.prompts_per_step=2", "reward.failed_reward=-1")
    (metrics,) = read_metrics(tmp_path / "grpo")
    assert metrics["reward/failed_rows"] == 4 and metrics["reward/reward"] == -1.0
