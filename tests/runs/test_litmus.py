"""Each litmus recipe on Ray: two ranks of FSDP2 and of a generation engine, two steps, one cluster for all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.recipe_files import load_recipe
from rlhf_dist.roles import Function, LanguageModel, Reward, base_of
from tests.tiny import save_classifier, save_judge, save_llama

Launch = Callable[..., dict[str, Any]]
DIGITS = f"{Path(__file__).parent}/digit_reward.py:digits"
MANY = "data.prompts_per_step=16"
"""For judges that seldom say something: a step without a verdict teaches nothing."""
ASKED = ("algorithm.marker=", "algorithm.question={prompt} {response} score:")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What some of them need beside the folder's model and data."""
    folder = tmp_path_factory.mktemp("litmus")
    rows = [{"prompt": f"{a}+1=", "response": str(a + 1), "answer": str(a + 1), "desirable": a % 2} for a in range(8)]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "labelled": folder / "labelled.jsonl",
        "scores": save_classifier(folder / "scores"),
        "other": save_llama(folder / "other", hidden=128, seed=1),
        "judge": save_judge(folder / "judge"),
    }


RECIPES: dict[str, tuple[str, ...]] = {
    "adaptive_kl": ("algorithm.mini_batches=2",),
    "chord": ("algorithm.warmup=1",),
    "dapo": ("algorithm.samples_per_prompt=2", "algorithm.rounds=2"),
    "egpo": (),
    "fine_grained_rlhf": ("relevance.model.path={scores}", "facts.model.path={scores}"),
    "gkd": ("teacher.model.path={other}",),
    "greso": ("algorithm.samples_per_prompt=2",),
    "grm": (),
    "hypo": (),
    "judge_grpo": (*ASKED, "judge.model.path={judge}", "algorithm.samples_per_prompt=4", "algorithm.votes=2", MANY),
    "kto": ("data.train.path={labelled}",),
    "ma_rlhf": ("algorithm.segment=3", "algorithm.mini_batches=2"),
    "nash_md": ("reference.model.path={other}", "algorithm.mixture=0.5"),
    "oaif": (
        *ASKED[:1],
        "algorithm.question={response_a} {response_b} better:",
        "judge.model.path={judge}",
        "algorithm.votes=2",
        MANY,
    ),
    "oreal": ("algorithm.samples_per_prompt=4", "algorithm.solved=0.2", "algorithm.warmup=1"),
    "pf_ppo": ("algorithm.samples_per_prompt=3", "algorithm.replayed=2", "algorithm.keep=best_random"),
    "reward_ensemble": ("algorithm.samples_per_prompt=2",),
    "salsa": ("second.model.path={other}", "algorithm.mini_batches=1"),
    "self_rewarding": (*ASKED, "algorithm.iteration=1", "actor.rollout.max_prompt_tokens=256", MANY),
    "two_teachers": ("first.model.path={other}", "algorithm.top_k=5"),
    "xpo": ("reference.model.path={other}",),
}
"""Recipe -> settings of its own; {name} is one of `made`. Safe RLHF runs in test_recipes.py."""


def small(recipe: str, data: Path) -> list[str]:
    """Engine, lengths, learning rate and rewards of the recipe's roles, and rows for all its sources."""
    loaded = load_recipe(recipe)
    settings = [f"data.sources.{name}.path={data}" for name in list(loaded.sources)[1:]]
    for role, kind in loaded.roles.items():
        if base_of(kind) is LanguageModel:
            settings += [f"{role}.rollout.engine=transformers", f"{role}.rollout.max_response_tokens=8"]
        if base_of(kind) is Reward:
            settings.append(f"{role}.function={DIGITS}")
        elif base_of(kind) is not Function:  # it has no weights
            settings.append(f"{role}.optimizer.lr=1e-3")
    return settings


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_litmus_recipe_runs_on_ray(recipe: str, launch_warm: Launch, made: dict[str, Path], data: Path) -> None:
    own = [filled(setting, made) for setting in RECIPES[recipe]]
    summary = launch_warm(recipe, *small(recipe, data), *own, "output.checkpoint_every=null", "output.save_model=false")
    assert all(math.isfinite(value) for value in summary["last"].values())
    learns = "judge" if recipe == "grm" else "actor"
    assert summary["last"][f"{learns}/version"] > 0 and summary["last"][f"{learns}/grad_norm"] > 0


def filled(setting: str, made: dict[str, Path]) -> str:
    """With the paths that a setting names."""
    for name, path in made.items():
        setting = setting.replace(f"{{{name}}}", str(path))
    return setting
