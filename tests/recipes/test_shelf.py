"""Every recipe of the shelf runs: as a graph and line by line, in this process, at tiny size, all numbers finite."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.testing import check_recipe
from tests.tiny import save_classifier, save_llama


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
    }


SETTINGS: dict[str, Callable[[dict[str, Path]], dict[str, Any]]] = {
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
    "kto": lambda made: {"data.train.path": made["labelled"]},
    "ma_rlhf": lambda made: {"algorithm.segment": 3, "algorithm.mini_batches": 2},
    "nash_md": lambda made: {"algorithm.average": 0.5},
    "pf_ppo": lambda made: {
        "algorithm.samples_per_prompt": 3,
        "algorithm.replayed": 2,
        "algorithm.keep": "best_random",
    },
    "reward_ensemble": lambda made: {"algorithm.samples_per_prompt": 2},
    "salsa": lambda made: {"second.model.path": made["other"], "algorithm.mini_batches": 1},
    "tool_grpo": lambda made: {
        **{"actor.rollout.max_response_tokens": 24, "algorithm.turn_tokens": 6, "algorithm.samples_per_prompt": 6},
        **{"algorithm.plain": True, "algorithm.begin": ":", "algorithm.end": "=", "algorithm.forgiving": False},
        **{"algorithm.unfinished_reward": -1.0, "algorithm.seconds": 300.0},  # which are a loaded machine's
    },
    "turn_ppo": lambda made: {"actor.rollout.max_response_tokens": 64, "algorithm.seconds": 300.0},
    "two_teachers": lambda made: {"first.model.path": made["other"], "algorithm.top_k": 5},
    "xpo": lambda made: {"reference.model.path": made["other"]},
}
"""Recipe -> settings that differ from the kit's."""


@pytest.mark.parametrize("name", SETTINGS)
def test_a_recipe_runs_alike_as_a_graph_and_line_by_line(name: str, made: dict[str, Path]) -> None:
    steps = check_recipe(name, **SETTINGS[name](made))
    learns = "judge" if name == "grm" else "actor"
    assert steps[-1][f"{learns}/version"] > 0 and steps[-1][f"{learns}/grad_norm"] > 0
