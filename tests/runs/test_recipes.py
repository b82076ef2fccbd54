"""Every recipe runs on real Ray, FSDP2 and a real generation engine, on two ranks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from controller.record.metrics import read_metrics
from rlhf_dist.batch import Batch

Launch = Callable[..., dict[str, Any]]
REWARD = f"{Path(__file__).parent}/digit_reward.py:digits"
COST = f"{Path(__file__).parent}/digit_reward.py:letters"
ROLLOUT = ("actor.rollout.max_response_tokens=8", f"reward.function={REWARD}", "actor.optimizer.lr=1e-3")
TRANSFORMERS = ("actor.rollout.engine=transformers", *ROLLOUT)

GENERATING = {"reward/reward", "reward/reward_std", "actor/response_tokens", "actor/longest_response"}
"""What every recipe that generates reports."""


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def moved(folder: Path, start: Path) -> bool:
    before, after = weights(start), weights(folder)
    return any(not np.array_equal(before[name], after[name]) for name in after if name in before)


def finite(summary: dict[str, Any]) -> bool:
    return all(math.isfinite(value) for value in summary["last"].values())


def test_sft_learns_and_leaves_a_run_folder_behind(launch_warm: Launch, tmp_path: Path, model: Path) -> None:
    summary = launch_warm("sft", "data.epochs=6", "actor.optimizer.lr=1e-2", "data.prompts_per_step=100")
    assert summary["last"]["actor/loss"] < 0.8 * summary["first"]["actor/loss"]
    assert summary["tokens_per_s"] > 0
    folder = tmp_path / "sft"
    assert [row["step"] for row in read_metrics(folder)] == list(range(6))
    assert [row["examples/epoch"] for row in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    assert AutoModelForCausalLM.from_pretrained(folder / "models/actor").config.hidden_size == 128
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "X"} == {"examples", "actor.update_actor", "checkpoint"}
    assert (folder / "config.yaml").is_file() and list((folder / "tensorboard").iterdir())


def test_reward_model_tells_chosen_from_rejected_and_serves_as_a_reward(launch_warm: Launch, tmp_path: Path) -> None:
    summary = launch_warm("reward_model", "steps=12", "reward.optimizer.lr=1e-2", "data.prompts_per_step=50")
    assert summary["last"]["reward/accuracy"] > summary["first"]["reward/accuracy"]
    trained = tmp_path / "reward_model/models/reward"
    assert AutoModelForSequenceClassification.from_pretrained(trained).config.num_labels == 1
    scored = launch_warm(
        "grpo", *TRANSFORMERS, "reward.function=null", f"reward.model.path={trained}", "algorithm.samples_per_prompt=2"
    )
    assert finite(scored) and scored["first"]["reward/reward"] != 0.0


def test_dpo_raises_the_chosen_over_the_rejected(launch_warm: Launch) -> None:
    summary = launch_warm("dpo", "steps=6", "actor.optimizer.lr=3e-3", "data.prompts_per_step=50")
    assert abs(summary["first"]["actor/loss"] - math.log(2)) < 1e-4, "at the start the policy is the reference"
    assert summary["last"]["actor/margin"] > 0


def test_ppo_through_vllm(launch_warm: Launch, tmp_path: Path, model: Path) -> None:
    settings = ("algorithm.samples_per_prompt=2", "algorithm.mini_batches=2", "output.rollouts_every=1")
    summary = launch_warm("ppo", *ROLLOUT, *settings)
    assert finite(summary)
    assert GENERATING | {"gae/ref_kl", "gae/ref_kl_k3", "actor/old_kl", "actor/old_kl_k3"} <= summary["last"].keys()
    assert 0 < summary["last"]["actor/response_tokens"] <= summary["last"]["actor/longest_response"] <= 8
    assert moved(tmp_path / "ppo/models/actor", model) and moved(tmp_path / "ppo/models/critic", model)
    dump = Batch.read_parquet(tmp_path / "ppo/rollouts/step_000001.parquet")
    assert dump.num_rows == 8 and {"prompt", "response", "rewards", "policy_version"} <= set(dump)
    assert set(dump["policy_version"].values) == {2}, "two optimizer steps were synced before step 1"
    for row in range(dump.num_rows):
        raw, plain = dump["raw_response"].row(row), dump["response"].row(row)
        assert re.sub("<(pad|bos|eos|unk)>", "", raw) == plain and raw.endswith("<eos>") == dump["finished"].row(row)


def test_grpo_generates_with_the_weights_it_trains_tied_and_tensor_parallel(launch_warm: Launch, tied: Path) -> None:
    settings = ("algorithm.samples_per_prompt=4", "algorithm.kl_coef=0", "steps=3", f"model.path={tied}")
    for parallel, pieces in ((1, 1), (2, 1), (2, 2)):
        own = (f"actor.rollout.tensor_parallel={parallel}", f"placement.pieces={pieces}")  # the rule takes pieces
        summary = launch_warm("grpo", *ROLLOUT, *settings, *own)
        assert summary["last"]["actor/version"] == 3
        assert summary["last"]["actor/rollout_mismatch"] < 1e-4, "sampler and trainer must be the same policy"


def test_remax_subtracts_the_greedy_response(launch_warm: Launch, tmp_path: Path) -> None:
    rows = tmp_path / "heldout.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}+3=", "answer": str(n + 3)}) + "\n" for n in range(10, 15)))
    summary = launch_warm("remax", *TRANSFORMERS, f"data.heldout.path={rows}")
    heldout = Batch.read_parquet(tmp_path / "remax/rollouts/heldout/step_000002.parquet")
    assert heldout.num_rows == 5 and {"prompt", "response", "rewards"} <= set(heldout), "all of them are kept"
    assert finite(summary)
    assert GENERATING | {"remax_advantage/baseline_reward", "remax_advantage/ref_kl"} <= summary["last"].keys()


def test_iterative_dpo_makes_pairs_of_its_own_responses(launch_warm: Launch) -> None:
    summary = launch_warm("iterative_dpo", *TRANSFORMERS, "algorithm.samples_per_prompt=4")
    assert 0 < summary["last"]["keep_best_and_worst/pairs"] <= 4


def test_iterative_dpo_survives_groups_without_a_preference(launch_warm: Launch) -> None:
    equal = f"{Path(__file__).parent}/test_recipes.py:always_one"
    summary = launch_warm("iterative_dpo", *TRANSFORMERS, f"reward.function={equal}", "algorithm.samples_per_prompt=2")
    assert summary["last"]["keep_best_and_worst/pairs"] == 0
    assert summary["last"]["keep_best_and_worst/zero_variance_groups"] == 1.0
    assert summary["steps_without_signal"] == 2, "a run says which of its steps taught nothing"


def always_one(prompt: str, response: str, answer: str) -> float:
    return 1.0


def test_safe_rlhf_raises_its_multiplier_while_the_cost_is_over_the_limit(launch_warm: Launch) -> None:
    summary = launch_warm(
        "safe_rlhf", *TRANSFORMERS, f"cost.function={COST}", "algorithm.mini_batches=2", "algorithm.cost_limit=-1.0"
    )
    assert finite(summary)
    assert summary["last"]["lagrange/multiplier"] > summary["first"]["lagrange/multiplier"] > 1.0


@pytest.mark.parametrize("recipe", ["ppo", "grpo"])
def test_the_eager_run_ends_with_the_weights_of_the_graph_run(launch_warm: Launch, tmp_path: Path, recipe: str) -> None:
    settings = (*(ROLLOUT if recipe == "ppo" else TRANSFORMERS), "algorithm.mini_batches=2", "steps=3")
    launch_warm(recipe, *settings, root=tmp_path / "graph")
    launch_warm(recipe, *settings, root=tmp_path / "eager", eager=True)
    one, other = (weights(tmp_path / way / recipe / "models/actor") for way in ("graph", "eager"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


HALF_STEPS = """
from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Prompts, Reference, Reward, State, state_op
from rlhf_dist.transforms import rloo_advantage

class Kl(State):
    def initial(self, cfg):
        return {"coef": 0.1}

    @state_op(reads=("policy_version",))
    def update(self, numbers, batch):
        versions = batch["policy_version"].values
        assert versions.min() == versions.max(), "one policy drew all tokens"
        return {"coef": 0.5 * numbers["coef"]}, {"coef": Mean(numbers["coef"]), "version": Mean(float(versions[0]))}

@recipe
def half_steps(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, first: Kl, second: Kl) -> None:
    for kl in (first, second):
        batch = reward.compute_reward(actor.generate_sequences(prompts, n=2))
        batch = reference.compute_ref_log_prob(actor.compute_log_prob(rloo_advantage(batch)))
        actor.update_actor(batch, loss=ppo_clip(0.2, kl_coef=2 * kl.value("coef")))
        kl.update(batch)
"""


def test_each_generation_of_a_step_has_the_weights_of_the_update_before_it(launch_warm: Launch, tmp_path: Path) -> None:
    file = tmp_path / "half_steps.py"
    file.write_text(HALF_STEPS)
    runs = [
        launch_warm(str(file), *TRANSFORMERS, "steps=3", root=tmp_path / way, eager=way == "eager")
        for way in ("graph", "eager")
    ]
    apart = ("placement=standalone",)
    runs.append(launch_warm(str(file), *TRANSFORMERS, "steps=3", *apart, root=tmp_path / "apart"))
    for summary in runs:
        versions = [summary[when][f"{kl}/version"] for when in ("first", "last") for kl in ("first", "second")]
        assert versions == [0, 1, 4, 5], "one update between a step's two generations, one after them"
        assert (summary["first"]["second/coef"], summary["last"]["second/coef"]) == (0.1, 0.025)
    graph, eager = (weights(tmp_path / way / "half_steps/models/actor") for way in ("graph", "eager"))
    assert graph and all(np.array_equal(graph[name], eager[name]) for name in graph)


@pytest.mark.timeout(600)  # three runs in processes of their own
def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(launch_warm: Launch, tmp_path: Path) -> None:
    settings = (*TRANSFORMERS, f"cost.function={COST}", "algorithm.mini_batches=2")
    every_2 = "output.checkpoint_every=2"
    straight = launch_warm("safe_rlhf", *settings, every_2, "steps=4", root=tmp_path / "straight")
    # Without a cadence a run ends with a checkpoint, and more steps continue it.
    launch_warm("safe_rlhf", *settings, "steps=2", root=tmp_path / "resumed")
    resumed = launch_warm("safe_rlhf", *settings, "steps=4", "resume=auto", root=tmp_path / "resumed")
    for role in ("actor", "critic", "cost_critic"):
        one, other = (weights(tmp_path / way / f"safe_rlhf/models/{role}") for way in ("straight", "resumed"))
        assert all(np.array_equal(one[name], other[name]) for name in one), role
    assert resumed["last"]["lagrange/multiplier"] == straight["last"]["lagrange/multiplier"]
    assert [row["step"] for row in read_metrics(tmp_path / "resumed/safe_rlhf")] == [0, 1, 2, 3]


USERS_RECIPE = '''
from dataclasses import dataclass

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reward


@dataclass(frozen=True, kw_only=True)
class Mine:
    scale: float = 2.0


@dataclass(frozen=True)
class Weighted:
    """A loss of my own."""

    scale: float
    reads = ("advantages",)
    outputs = ("log_probs",)
    average = "tokens"

    def __call__(self, model, rows):
        loss = -self.scale * rows["advantages"] * model.log_probs
        return loss, {"mine": loss.detach()}


@host_op(reads=("rewards", "response_mask"), writes=("advantages",), scope="batch")
def centred(batch: Batch) -> Batch:
    rewards, mask = batch["rewards"].values, batch["response_mask"]
    return Batch({"advantages": Column((rewards - rewards.mean()).repeat(mask.lengths), mask.offsets)})


def my_reward(prompt: str, response: str, answer: str) -> float:
    return float(len(set(response)))


@recipe
def mine(prompts: Prompts, actor: Actor, reward: Reward, cfg: Mine) -> None:
    batch = centred(reward.compute_reward(actor.generate_sequences(prompts, n=2)))
    actor.update_actor(batch, loss=Weighted(cfg.scale))
'''


def test_a_users_recipe_with_its_own_loss_reward_and_advantage(launch_warm: Launch, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "mine.py"
    file.parent.mkdir()
    file.write_text(USERS_RECIPE)
    summary = launch_warm(str(file), *TRANSFORMERS[:2], "reward.function=my_reward", "algorithm.scale=3.0")
    assert summary["recipe"] == "mine" and "actor/mine" in summary["last"]
