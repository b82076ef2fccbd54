"""Held-out rows are played as the recipe plays its own: environment, limits, speakers and fields, greedily and the same
at every step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from controller.lifecycle.api import launch
from controller.record.metrics import read_metrics
from rlhf_dist.batch import Batch
from rlhf_dist.compose import compose
from rlhf_dist.held_out import evaluations, held_out_fields
from rlhf_dist.testing.tiny_model import save_llama

RECIPE = '''
"""An episode is a hint that the row has, a turn, what the other says and what was thrown, and a turn."""

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import Environment, EpisodeLimits
from rlhf_dist.roles import Actor, Opponent, Prompts, Reward
from rlhf_dist.transforms import grpo_advantage


class Hinted(Prompts):
    fields = {"hint": "text", "unread": "text"}


class Thrown(Environment):
    reads = ("hint",)

    async def episode(self, chat, row):
        chat.say(row.hint)
        await chat.generate(max_tokens=4)
        if row.answer == "7":
            raise OSError("no dice for 7")
        other = chat.speaker("other")
        other.say("?")
        said = await other.generate(max_tokens=2)
        thrown = int(chat.rng.integers(10**6))
        chat.say(f"{said.text} {thrown}")
        while True:
            reply = await chat.generate(max_tokens=4)
            chat.reward(float(len(reply.text)))


class Scored(Thrown):
    rewards = False

    async def episode(self, chat, row):
        await chat.generate(max_tokens=4)


def digits(response):
    return sum(one.isdigit() for one in response)


@recipe
def dice(prompts: Hinted, actor: Actor, other: Opponent) -> None:
    limits = EpisodeLimits(turns=3)
    batch = actor.run_episodes(prompts, environment=Thrown(), n=2, limits=limits, speakers={"other": other})
    actor.update_actor(grpo_advantage(batch), loss=ppo_clip(0.2, on_policy=True))


@recipe
def scored(prompts: Hinted, actor: Actor, reward: Reward) -> None:
    batch = reward.compute_reward(actor.run_episodes(prompts, environment=Scored(), n=2))
    actor.update_actor(grpo_advantage(batch), loss=ppo_clip(0.2, on_policy=True))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe's file, a model, and rows."""
    made = tmp_path_factory.mktemp("evaluation")
    save_llama(made / "model")
    (made / "dice.py").write_text(RECIPE)
    for name, answers in {"train": (1, 2, 3, 4), "heldout": (5, 6, 7)}.items():
        rows = [{"prompt": f"{a}+0=", "answer": str(a), "hint": f"say {a}", "unread": "x"} for a in answers]
        if name == "heldout":
            rows = [{key: value for key, value in row.items() if key != "unread"} for row in rows]
        (made / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


def settings(folder: Path, root: Path) -> list[str]:
    given = [f"model.path={folder}/model", "model.dtype=float32", "task=none", "data.prompts_per_step=2", "steps=2"]
    given += [f"data.train.path={folder}/train.jsonl", f"data.heldout.path={folder}/heldout.jsonl"]
    given += [f"output.root={root}", "output.evaluate_every=1", "output.checkpoint_every=null"]
    given += ["output.save_model=false", "actor.rollout.engine=transformers"]
    return [*given, "actor.rollout.max_response_tokens=48", "actor.optimizer.lr=1e-2"]


def run(folder: Path, root: Path, recipe: str, *more: str) -> list[dict[str, Any]]:
    given = [*settings(folder, root), *more]
    launch(f"{folder}/dice.py:{recipe}", *given, f"name={recipe}", local=True, quiet=True)
    return [row for row in read_metrics(root / recipe) if row.get("kind") == "evaluation"]


def test_held_out_episodes_are_those_of_the_recipe(folder: Path, tmp_path: Path) -> None:
    rows = run(folder, tmp_path, "dice", "other.rollout.max_response_tokens=8", "other.rollout.engine=transformers")
    assert [(row["step"], row["heldout/policy_version"], row["heldout/staleness"]) for row in rows] == [
        (0, 0, 0), (1, 1, 0), (2, 2, 0)
    ]  # fmt: skip
    for row in rows:
        assert (row["heldout/episodes"], row["heldout/rows"], row["heldout/lost"]) == (3, 2, 1), "one of each, not n"
        assert row["heldout/outcome_environment_error"] == 1 and row["heldout/turns"] == 3
        assert row["heldout/outcome_turns"] == 2, "its limits are those of the recipe"
    played = [Batch.read_parquet(tmp_path / f"dice/rollouts/heldout/step_{step:06d}.parquet") for step in range(3)]
    texts = [[json.loads(text) for text in batch["transcript"].rows()] for batch in played]
    assert texts[0][0][0]["text"].endswith("say 5"), "the hint is a column of held-out rows, too"
    thrown = [[row[2]["text"] for row in batch] for batch in texts]
    assert thrown[0] == thrown[1] == thrown[2] and thrown[0][0] != thrown[0][1], "what changes is the policy"
    assert {entry["version"] for row in texts[2] for entry in row if "version" in entry} == {2}
    lost = (tmp_path / "dice/episodes/lost_actor_rank_0.jsonl").read_text().splitlines()
    assert [json.loads(line)["held_out"] for line in lost] == [True] * 3


def test_a_rule_scores_held_out_episodes_without_rewards_of_their_own(folder: Path, tmp_path: Path) -> None:
    rows = run(folder, tmp_path, "scored", "reward.function=digits", "steps=1")
    batch = Batch.read_parquet(tmp_path / "scored/rollouts/heldout/step_000001.parquet")
    digits = [sum(one.isdigit() for one in text) for text in batch["response"].rows()]
    assert rows[-1]["heldout/reward"] == pytest.approx(sum(digits) / 3) and batch["turns"].values.tolist() == [1] * 3


def test_who_is_evaluated_and_what_its_rows_need(folder: Path, tmp_path: Path) -> None:
    launches = {name: compose(f"{folder}/dice.py:{name}", settings(folder, tmp_path)) for name in ("dice", "scored")}
    graphs = {name: (one.recipe, one.dataflow) for name, one in launches.items()}
    assert {name: [*evaluations(*of)] for name, of in graphs.items()} == {"dice": ["actor"], "scored": ["actor"]}
    assert held_out_fields(*graphs["dice"]) == {"hint": "text"}, "not what no environment reads"
    assert evaluations(*graphs["scored"])["actor"].roles.keys() == {"actor", "reward"}
