"""`@recipe(evaluation=...)`: what is run on held-out rows is a graph of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from controller.lifecycle.api import launch
from controller.record.metrics import read_metrics
from rlhf_dist.compose import compose
from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.roles import Actor, Critic, Examples, Prompts, Reward
from rlhf_dist.testing.tiny_model import save_llama

TAUGHT = '''
"""Supervised training: nothing is generated but for its evaluation, nor is anything scored."""

from dataclasses import dataclass

from rlhf_dist.algorithms import nll
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.parsers import Number
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Examples, Judge, Prompts, Reward
from rlhf_dist.transforms import tries, verdict_means


@dataclass(frozen=True, kw_only=True)
class Taught:
    tried: int = 4
    """Tries at each held-out prompt."""


def digits(response):
    return float(any(one.isdigit() for one in response))


def held_out(prompts: Prompts, actor: Actor, reward: Reward, judge: Judge, cfg: Taught) -> None:
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.tried))
    tries(batch)
    verdicts = judge.generate_sequences(batch, template=Template("is {response} good? "), parser=Number())
    verdict_means(batch, verdicts, into="liked")


@recipe(evaluation=held_out)
def taught(examples: Examples, actor: Actor, reward: Reward, judge: Judge, cfg: Taught) -> None:
    actor.update_actor(examples, loss=nll())
'''


def settings(folder: Path) -> list[str]:
    save_llama(folder / "model")
    (folder / "taught.py").write_text(TAUGHT)
    for name in ("train", "sums", "more"):
        rows = [{"prompt": f"{a}+{len(name)}=", "response": "7", "answer": "7"} for a in range(4)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    held_out = f"{{sums: {{path: {folder}/sums.jsonl}}, more: {{path: {folder}/more.jsonl}}}}"
    given = [f"model.path={folder}/model", "model.dtype=float32", "task=none", "data.prompts_per_step=2", "steps=2"]
    given += [f"data.train.path={folder}/train.jsonl", f"data.heldout.mix={held_out}", f"output.root={folder}"]
    given += ["actor.rollout.max_response_tokens=6", "judge.rollout.max_response_tokens=6", "reward.function=digits"]
    given += ["actor.rollout.engine=transformers", "judge.rollout.engine=transformers"]
    return [*given, "output.evaluate_every=1", "output.checkpoint_every=null", "output.save_model=false"]


def test_a_recipe_that_never_generates_is_evaluated_by_tries_of_two_sets_and_a_judge(tmp_path: Path) -> None:
    launch(f"{tmp_path}/taught.py", *settings(tmp_path), local=True, quiet=True)
    rows = [row for row in read_metrics(tmp_path / "taught") if row.get("kind") == "evaluation"]
    assert [(row["step"], row["heldout/actor/policy_version"]) for row in rows] == [(0, 0), (1, 1), (2, 2)], (
        "synced for it"
    )
    for row in rows:
        assert row["heldout/pass_at_1"] == pytest.approx(row["heldout/reward"]), "the reward is 0 or 1"
        assert row["heldout/pass_at_4"] == pytest.approx(
            (row["heldout/sums/pass_at_4"] + row["heldout/more/pass_at_4"]) / 2
        )
        assert row["heldout/actor/rows"] == row["heldout/judge/rows"] == 32 and row["heldout/unparsed"] < 1


def test_what_only_an_evaluation_asks_is_not_there_without_held_out_rows(tmp_path: Path) -> None:
    given = settings(tmp_path)
    assert {*compose(f"{tmp_path}/taught.py", given).used_roles} == {"actor", "reward", "judge"}
    assert {*compose(f"{tmp_path}/taught.py", [*given, "data.heldout=null"]).used_roles} == {"actor"}


def test_an_evaluation_measures_roles_of_its_recipe(tmp_path: Path) -> None:
    def learns(prompts: Prompts, actor: Actor) -> None:
        from rlhf_dist.algorithms import nll

        actor.update_actor(actor.generate_sequences(prompts), loss=nll())

    def two(prompts: Prompts, examples: Examples, actor: Actor) -> None: ...

    def other(prompts: Prompts, actor: Reward) -> None: ...

    def plain(prompts: Any, actor: Any, critic: Any) -> None: ...

    for function in (learns, two, other, plain):
        function.__annotations__ = {
            name: {"prompts": Prompts, "examples": Examples, "critic": Critic}.get(name, Actor)
            for name in function.__code__.co_varnames[: function.__code__.co_argcount]
        }
    other.__annotations__["actor"] = Reward
    with pytest.raises(
        GraphError, match="recipe plain: its evaluation other must have roles of the recipe, .* got actor"
    ):
        recipe(evaluation=other)(plain)
    with pytest.raises(GraphError, match="its evaluation two must have one source, .* got 2 sources"):
        recipe(evaluation=two)(plain)
    with pytest.raises(GraphError, match="actor.update_actor changes weights, and an evaluation only measures"):
        trace(recipe(evaluation=learns)(plain))
