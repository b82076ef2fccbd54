"""Episodes on Ray: an environment of the user's file by value, lost rows, a rule that scores them, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.record.metrics import read_metrics
from rlhf_dist.batch import Batch

RECIPE = '''
"""Two kinds of episodes, one with rewards of its own and one that a rule scores."""

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import Environment
from rlhf_dist.roles import Actor, Prompts, Reward
from rlhf_dist.transforms import grpo_advantage


class Turns(Environment):
    def __init__(self, rewards):
        self.rewards = rewards

    async def episode(self, chat, row):
        for turn in range(2):
            reply = await chat.generate(max_tokens=4)
            if self.rewards:
                chat.reward(float(len(reply.text)))
            if row.answer == "7":
                raise OSError("no tool for 7")
            chat.say(await chat.run(str.upper, " and?"))
        await chat.generate(max_tokens=4)


def digits(response):
    return sum(one.isdigit() for one in response)


@recipe
def episodes(prompts: Prompts, actor: Actor, reward: Reward) -> None:
    own = grpo_advantage(actor.compute_log_prob(actor.run_episodes(prompts, environment=Turns(True), n=2)))
    ruled = reward.compute_reward(actor.run_episodes(prompts, environment=Turns(False), n=2))
    ruled = grpo_advantage(actor.compute_log_prob(ruled))
    actor.update_actor([(own, ppo_clip(0.2)), (ruled, ppo_clip(0.2))])
'''


def test_episodes_on_ray_are_those_of_one_process(launch_warm: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "episodes.py"
    file.write_text(RECIPE)
    rows = [{"prompt": f"{answer}+0=", "answer": str(answer)} for answer in (5, 6, 7, 8)]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = [
        *("reward.function=digits", f"data.train.path={tmp_path}/few.jsonl", "output.rollouts_every=1", "steps=1"),
        *("actor.rollout.engine=transformers", "actor.rollout.max_response_tokens=48"),
    ]
    launch_warm(str(file), *settings, "placement=split")
    launch_warm(str(file), *settings, "name=here", local=True)
    (there,), (here,) = read_metrics(tmp_path / "episodes"), read_metrics(tmp_path / "here")
    assert there["actor/episodes"] == 8 and there["actor/lost"] == 2 == there["actor#2/outcome_environment_error"]
    for name in ("actor/reward", "reward/reward", "actor/drawn_tokens", "actor#2/turns"):
        assert there[name] == pytest.approx(here[name], rel=1e-9), name
    assert there["actor/rollout_ratio_error"] < 1e-4
    batch = Batch.read_parquet(tmp_path / "episodes" / "rollouts" / "step_000000.parquet")
    assert batch.num_rows == 6 and "7+0=" not in batch["prompt"].rows() and set(batch["outcome"].rows()) == {"finished"}
    assert np.unique(batch["group_id"].values, return_counts=True)[1].tolist() == [2, 2, 2]
    logs = list((tmp_path / "episodes" / "episodes").glob("lost_actor_rank_*.jsonl"))
    lost = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    assert len(lost) == 4 and {entry["detail"] for entry in lost} == {"OSError: no tool for 7"}


def test_ranks_that_share_a_copy_play_one_set_of_episodes(launch_warm: Callable[..., dict[str, Any]]) -> None:
    settings = [
        *("placement.pools.main.slots=1", "placement.pools.gen.slots=2", "placement.rollout=gen"),
        *("actor.rollout.tensor_parallel=2", "actor.rollout.max_response_tokens=48", "actor.optimizer.lr=1e-3"),
        *("algorithm.plain=true", "algorithm.begin=:", "algorithm.end==", "algorithm.turn_tokens=6"),
        *("algorithm.samples_per_prompt=4", "algorithm.turns=4", "algorithm.unfinished_reward=-1"),
    ]
    last = launch_warm("tool_grpo", *settings)["last"]
    assert last["actor/episodes"] == last["actor/rows"] == 16 and last["actor/turns"] > 1, "the second rank plays none"
    assert last["actor/version"] == 2
    assert last["actor/rollout_mismatch"] < 1e-4, "both ranks have drawn with the weights that are trained"
