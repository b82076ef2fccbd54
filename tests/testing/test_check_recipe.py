"""`check_recipe`: recipes of the shelf pass, and what a faulty one does is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.testing import CheckFailed, check_recipe

HEAD = """
import random
from dataclasses import dataclass
import numpy as np
from rlhf_dist.algorithms import policy_gradient
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.host import HostResult
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import Actor, Prompts, Reward

@host_op(reads=("rewards", "response_mask"), writes=("advantages",))
def advantage(batch, *, factor=1.0):
    mask = batch["response_mask"]
    values = factor * batch["rewards"].values.repeat(mask.lengths)
    return HostResult(columns=Batch({"advantages": Column(values.astype("float32"), mask.offsets)}), metrics=METRICS)

@recipe
def mine(prompts: Prompts, actor: Actor, reward: Reward) -> None:
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=2))
"""
METRICS = "\nMETRICS = {'seen': Mean(1.0)}\n"
UPDATE = "    actor.update_actor(batch, loss=policy_gradient())\n"
DIVIDES = """
@dataclass(frozen=True)
class Divides:
    reads = ("advantages",)
    outputs = ("log_probs",)
    average = "tokens"
    def __call__(self, model, rows):
        return -rows["advantages"] * model.log_probs / rows.mask.sum(), {}
"""


@pytest.mark.parametrize("name", ["ppo", "grpo", "dpo", "safe_rlhf"])
def test_recipes_of_the_shelf_pass(name: str) -> None:
    steps = check_recipe(name)
    assert [row["step"] for row in steps] == [0, 1] and steps[1]["actor/version"] > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            HEAD + UPDATE + METRICS,
            r"mine.py:\d+: actor.update_actor reads column 'advantages'.*which the batch does not",
        ),
        (
            HEAD + "    batch = advantage(batch, factor=random.random())\n" + UPDATE + METRICS,
            "ends with other weights than",
        ),
        (
            HEAD + "    batch = advantage(batch)\n" + UPDATE + METRICS.replace("1.0", "float('nan')"),
            "metric advantage/seen is nan or infinite at step 0",
        ),
        (
            HEAD + "    batch = advantage(batch, factor=float('inf'))\n" + UPDATE + METRICS,
            "run as a graph: actor.update_actor .*policy_gradient",
        ),
        (
            HEAD + "    batch = advantage(batch)\n    actor.update_actor(batch, loss=Divides())\n" + METRICS + DIVIDES,
            r"mine.py:\d+: Divides: its value depends on how a batch is cut",
        ),
        ("import nothing_of_the_kind", "mine.py:1: ModuleNotFoundError"),
    ],
    ids=["missing column", "randomness", "a metric of nan", "an infinite advantage", "loss", "import"],
)
def test_a_fault_is_one_line_that_says_where(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(CheckFailed, match=said) as failed:
        check_recipe(tmp_path / "mine.py")
    assert str(failed.value).startswith("mine.py: ") and "\n" not in str(failed.value)


def test_settings_of_ones_own_go_last() -> None:
    assert len(check_recipe("sft", steps=1, **{"data.prompts_per_step": 6})) == 1
    with pytest.raises(CheckFailed, match="sft: unknown key algorithm.clp"):
        check_recipe("sft", **{"algorithm.clp": 1})
