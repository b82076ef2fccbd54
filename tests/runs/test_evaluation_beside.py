"""Evaluation beside the steps, in the pool that generates: the numbers of one between the steps, each once, also after
a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from controller.record.metrics import read_metrics
from tests.runs.test_recipes import REWARD


def told(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder) if row.get("kind") == "evaluation"]


def test_numbers_are_those_of_an_evaluation_between_steps(
    launch_warm: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """About 40 s."""
    rows = [{"prompt": f"{answer}+0=", "answer": str(answer)} for answer in range(8)]
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = [
        *(f"data.heldout.path={tmp_path}/heldout.jsonl", f"reward.function={REWARD}", "output.rollouts_every=1"),
        *("actor.rollout.engine=transformers", "actor.rollout.max_response_tokens=8", "actor.optimizer.lr=1e-2"),
        *("placement.pools.main.slots=1", "placement.pools.gen.slots=1", "placement.rollout=gen"),
        *("output.evaluate_every=1", "output.checkpoint_every=1"),
    ]
    launch_warm("grpo", *settings, "name=between", "steps=3")
    beside = [*settings, "output.evaluate_beside=true", "name=beside"]
    launch_warm("grpo", *beside, "steps=2")
    assert [row["step"] for row in told(tmp_path / "beside")] == [0, 1, 2]
    summary = launch_warm("grpo", *beside, "steps=3", "resume=auto")
    between, found = told(tmp_path / "between"), told(tmp_path / "beside")
    assert [row["step"] for row in found] == [0, 1, 2, 3] == [row["heldout/policy_version"] for row in found]
    assert [row.keys() for row in found] == [row.keys() for row in between]
    for one, other in zip(between, found, strict=True):
        for name in ("heldout/reward", "heldout/response_tokens", "heldout/rows"):
            assert one[name] == pytest.approx(other[name], rel=1e-6), name
    assert len({row["heldout/response_tokens"] for row in found} | {row["heldout/reward"] for row in found}) > 2
    steps = [row for row in read_metrics(tmp_path / "beside") if "kind" not in row]
    assert [row["step"] for row in steps] == [0, 1, 2]
    assert not [name for row in steps for name in row if name.startswith("heldout/")]
    alone = [row for row in read_metrics(tmp_path / "between") if "kind" not in row]
    assert [row["actor/response_tokens"] for row in steps] == [row["actor/response_tokens"] for row in alone]
    assert [int(one["step"]) for one in summary["evaluations"]] == [2, 3]
    dumped = sorted((tmp_path / "beside/rollouts/heldout").glob("*.parquet"))
    assert [file.stem for file in dumped] == [f"step_{step:06d}" for step in range(4)]
    trace = json.loads((tmp_path / "beside/trace.json").read_text())["traceEvents"]
    spans = {one["name"]: (one["ts"], one["ts"] + one["dur"]) for one in trace if one["ph"] == "X"}
    held, reshard = spans["heldout/actor.generate_sequences"], spans["actor.reshard"]
    assert spans["actor.generate_sequences"][1] <= held[0] and held[1] <= reshard[0]
    graph = json.loads((tmp_path / "beside/graph.json").read_text())
    assert "beside every step" in graph["evaluations"][0]["when"] and len(graph["evaluations"][0]["nodes"]) == 4
