"""Every recipe of the shelf runs: as a graph and line by line, in this process, at tiny size, all numbers finite."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.testing import check_recipe
from tests.tiny import save_classifier, save_judge, save_llama


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What some recipes need beside the kit's own model and data."""
    folder = tmp_path_factory.mktemp("made")
    rows = [{"prompt": f"{a}+1=", "response": str(a + 1), "answer": str(a + 1), "desirable": a % 2} for a in range(8)]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "labelled": folder / "labelled.jsonl",
        "scores": save_classifier(folder / "scores"),
        "other": save_llama(folder / "other", seed=1),
        "judge": save_judge(folder / "judge"),
    }


ASKED = {"algorithm.marker": "", "algorithm.question": "{prompt} {response} score:"}
"""For judges that read a few hundred characters, and say a verdict without more words."""
PAIR = {**ASKED, "algorithm.question": "{response_a} {response_b} better:", "algorithm.votes": 2}


SETTINGS: dict[str, Callable[[dict[str, Path]], dict[str, Any]]] = {
    "adaptive_kl": lambda made: {"algorithm.mini_batches": 2},
    "chord": lambda made: {"algorithm.warmup": 1},
    "dapo": lambda made: {"algorithm.samples_per_prompt": 2, "algorithm.rounds": 2},
    "fine_grained_rlhf": lambda made: {
        **{f"{role}.model.path": made["scores"] for role in ("relevance", "facts")},
        **{"algorithm.relevance_every": 2, "algorithm.facts_every": 3},
    },
    "egpo": lambda made: {},
    "gkd": lambda made: {"teacher.model.path": made["other"]},
    "greso": lambda made: {"algorithm.samples_per_prompt": 2},
    "hypo": lambda made: {},
    "grm": lambda made: {},
    "judge_grpo": lambda made: {
        **ASKED,
        **{"judge.model.path": made["judge"], "algorithm.samples_per_prompt": 3, "algorithm.votes": 2},
    },
    "kto": lambda made: {"data.train.path": made["labelled"]},
    "ma_rlhf": lambda made: {"algorithm.segment": 3, "algorithm.mini_batches": 2},
    "nash_md": lambda made: {"reference.model.path": made["other"], "algorithm.mixture": 0.5},
    "oaif": lambda made: {**PAIR, "judge.model.path": made["judge"], "data.prompts_per_step": 8},
    "oreal": lambda made: {"algorithm.samples_per_prompt": 4, "algorithm.solved": 0.2, "algorithm.warmup": 1},
    "pf_ppo": lambda made: {
        "algorithm.samples_per_prompt": 3,
        "algorithm.replayed": 2,
        "algorithm.keep": "best_random",
    },
    "reward_ensemble": lambda made: {"algorithm.samples_per_prompt": 2},
    "salsa": lambda made: {"second.model.path": made["other"], "algorithm.mini_batches": 1},
    "self_rewarding": lambda made: {**ASKED, "algorithm.iteration": 1},
    "two_teachers": lambda made: {"first.model.path": made["other"], "algorithm.top_k": 5},
    "xpo": lambda made: {"reference.model.path": made["other"]},
}
"""Recipe -> settings that differ from the kit's."""


@pytest.mark.parametrize("name", SETTINGS)
def test_a_recipe_runs_alike_as_a_graph_and_line_by_line(name: str, made: dict[str, Path]) -> None:
    steps = check_recipe(name, **SETTINGS[name](made))
    learns = "judge" if name == "grm" else "actor"
    assert steps[-1][f"{learns}/version"] > 0 and steps[-1][f"{learns}/grad_norm"] > 0


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("nash_md", {"algorithm.opponent": "average", "algorithm.average": 0.5}),
        ("nash_md", {"algorithm.mixture": 0.5, "placement.pools.main.device_bytes": 400_000}),  # both engines come
        (
            "judge_grpo",
            {**PAIR, "algorithm.mode": "pairwise", "algorithm.rounds": 2, "algorithm.samples_per_prompt": 4},
        ),
        ("judge_grpo", {**ASKED, "algorithm.question": "{listing} scores:", "algorithm.mode": "listwise"}),
    ],
)
def test_another_way_of_a_recipe_runs_too(name: str, settings: dict[str, Any], made: dict[str, Path]) -> None:
    judge = {"judge.model.path": made["judge"]} if name == "judge_grpo" else {}
    steps = check_recipe(name, **{"algorithm.samples_per_prompt": 2, **judge, **settings})
    assert steps[-1]["actor/version"] == 2 and steps[-1]["actor/grad_norm"] > 0
    if judge:
        assert steps[-1]["judge/unparsed"] < 1
