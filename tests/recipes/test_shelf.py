"""Every recipe of the shelf runs, in this process, at tiny size, all numbers finite: each file as a graph and line by
line, each variant of it as a graph. What is listed is what runs."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_dist.recipe_files import list_recipes, load_papers
from rlhf_dist.testing import check_recipe
from rlhf_dist.testing.tiny_model import save_llama
from tests.recipes.settings import ASKED, PAIR, Made, make_files, settings_for

PAPERS = load_papers()
VARIANTS = [
    name for name, (paper, _) in PAPERS.items() if "/" in name and paper.settings and not name.startswith("judge_grpo")
]
"""Those that differ from their file in settings, not in data alone; a judge is asked short questions, further below."""
QUIET = {
    "shaped_rewards/omit_long": "nearly every response of a random model is cut by the limit",
    **dict.fromkeys(("grpo/countdown", "grpo/toolrl", "grpo/bleuberi"), "no response of a random model has the format"),
    **dict.fromkeys(("reex_sql", "reex_sql/tree_decoding"), "no query of a random model runs"),
    "self_improving/own_judge": "a random model says few verdicts",
    **dict.fromkeys(("personal/vpl", "personal/dmoerm"), "a network of a state learns, and no model"),
    **{
        name: "nothing learns"
        for name in PAPERS
        if name.startswith(("pair_accuracy/", "best_of_list/", "guided_decoding/"))
    },
}
"""Recipes and variants without a gradient at this size, and why."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    return {**make_files(folder), "model": save_llama(folder / "model")}


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_a_recipe_runs_alike_as_a_graph_and_line_by_line(name: str, made: Made) -> None:
    steps = check_recipe(name, **{"model.path": made["model"], **settings_for(name, made)})
    learning = [key.removesuffix("/version") for key in steps[-1] if key.endswith("/version")]
    assert any(steps[-1][f"{role}/version"] > 0 for role in learning) or not learning
    assert QUIET.get(name) or all(steps[-1].get(f"{role}/grad_norm", 1) > 0 for role in learning), name


@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_of_settings_runs(name: str, made: Made) -> None:
    given = {"steps": 1, "model.path": made["model"], **settings_for(name, made)}
    steps = check_recipe(name, both_ways=False, **given)
    assert QUIET.get(name) or any(value > 0 for key, value in steps[-1].items() if key.endswith("/grad_norm"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("nash_md", {"algorithm.mixture": 0.5, "placement.pools.main.device_bytes": 400_000}),  # both engines come
        (
            "judge_grpo",
            {**PAIR, "algorithm.mode": "pairwise", "algorithm.rounds": 2, "algorithm.samples_per_prompt": 4},
        ),
        ("judge_grpo", {**ASKED, "algorithm.question": "{listing} scores:", "algorithm.mode": "listwise"}),
    ],
)
def test_another_way_of_a_recipe_runs_too(name: str, settings: dict[str, Any], made: Made) -> None:
    judge = {"judge.model.path": made["judge"]} if name == "judge_grpo" else {}
    steps = check_recipe(name, **{"algorithm.samples_per_prompt": 2, **judge, **settings})
    assert steps[-1]["actor/version"] == 2 and steps[-1]["actor/grad_norm"] > 0
    if judge:
        assert steps[-1]["judge/unparsed"] < 1
