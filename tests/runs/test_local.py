"""`--local`: a run in one process, without Ray and vLLM, to the same weights; breakpoints anywhere."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch
from tests.runs.terminal import Terminal
from tests.runs.test_recipes import COST, ROLLOUT, weights

RECIPE = """
from dataclasses import dataclass

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.algorithms import loss
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reward


def length(prompt, response, answer):
    return float(len(response))


@host_op(reads=("rewards", "response_ids"), writes=("advantages",))
def centred(batch):
    breakpoint()
    rewards = batch["rewards"].values - batch["rewards"].values.mean()
    return Batch(
        {"advantages": Column(rewards.repeat(batch["response_ids"].lengths), batch["response_ids"].offsets)}
    )


@loss(reads=("advantages",), average="tokens")
def plain(model, rows, weight: float = 1.0):
    breakpoint()
    return -weight * rows["advantages"] * model.log_probs, {}


@recipe
def mine(prompts: Prompts, actor: Actor, reward: Reward) -> None:
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=2))
    breakpoint()
    actor.update_actor(centred(actor.compute_log_prob(batch)), loss=plain(0.5))
"""


def test_a_local_run_is_the_run_on_ray(launch_warm: Callable[..., Any], tmp_path: Path) -> None:
    one_slot = ("placement=colocate", "placement.pools.main.slots=1", "actor.rollout.engine=transformers")
    settings = (*ROLLOUT, f"cost.function={COST}", "algorithm.mini_batches=2", "steps=3", "output.checkpoint_every=2")
    launch_warm("safe_rlhf", *settings, *one_slot, root=tmp_path / "ray")
    local = launch_warm("safe_rlhf", *settings, local=True, root=tmp_path / "local")
    for role in ("actor", "critic", "cost_critic"):
        one, other = (weights(tmp_path / way / "safe_rlhf/models" / role) for way in ("ray", "local"))
        assert one.keys() == other.keys() and len(one) > 10
        assert all(np.array_equal(one[name], other[name]) for name in one), role
    drawn = [Batch.read_parquet(tmp_path / way / "safe_rlhf/rollouts/step_000000.parquet") for way in ("ray", "local")]
    assert drawn[0].to_arrow().equals(drawn[1].to_arrow()) and drawn[0].num_rows > 0
    graphs = [json.loads((tmp_path / way / "safe_rlhf/graph.json").read_text()) for way in ("ray", "local")]
    assert graphs[0] == graphs[1] and graphs[0]["metrics"]["actor/grad_norm"] == "actor.update_actor"
    again = launch_warm("safe_rlhf", *settings[:-1], "steps=4", "resume=auto", local=True, root=tmp_path / "local")
    assert (local["steps"], again["steps"]) == (3, 4), "a second run in this process, from the first one's checkpoint"


def test_breakpoints_stop_anywhere_and_neither_ray_nor_vllm_is_needed(model: Path, data: Path, tmp_path: Path) -> None:
    for name in ("ray", "vllm", "deepspeed"):
        (tmp_path / "absent" / name).mkdir(parents=True)
        (tmp_path / "absent" / name / "__init__.py").write_text(f"raise ImportError('{name} is not installed')")
    (tmp_path / "mine.py").write_text(RECIPE)
    command = [str(Path(sys.executable).with_name("rlhf-dist")), "run", "mine.py", "--local", "task=none"]
    command += [f"model.path={model}", f"data.train.path={data}", "data.prompts_per_step=2", "steps=2"]
    command += ["reward.function=length", "actor.rollout.max_response_tokens=4", "output.tracker=none"]
    terminal = Terminal(command, tmp_path, str(tmp_path / "absent"))
    terminal.expect("(Pdb) ")
    terminal.send("batch.fetch('rewards')")
    assert len(re.findall(r"\d\.0", terminal.expect("(Pdb) "))) == 4
    terminal.send("c")
    terminal.expect("(Pdb) ")
    terminal.send("batch['rewards'].values.shape")
    assert "(4,)" in terminal.expect("(Pdb) "), "in a host op"
    terminal.send("c")
    terminal.expect("(Pdb) ")
    terminal.send("model.log_probs.requires_grad")
    assert "True" in terminal.expect("(Pdb) "), "in a loss, with the model's outputs"
    terminal.send("c")
    terminal.expect("step 1/2")
    terminal.expect("(Pdb) ")
    terminal.send("c")
    terminal.expect("(Pdb) ")
    terminal.send("q")
    assert terminal.ended() == 130
    assert "interrupted" in terminal.said and "Traceback" not in terminal.said
