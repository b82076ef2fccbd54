"""Placements that are planned, on real Ray and engines: a plan runs as it is, and the run reports against it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_dist.planner.calibration import load_calibration
from rlhf_dist.planner.machine import CPU_EFFICIENCY, this_machine

Launch = Callable[..., dict[str, Any]]


def test_auto_plans_runs_and_reports_predicted_beside_measured(launch: Launch, tmp_path: Path) -> None:
    reward = f"{Path(__file__).parent}/digit_reward.py:digits"
    tiny = ("actor.rollout.engine=transformers", "actor.rollout.max_response_tokens=6", "output.save_model=false")
    summary = launch("ppo", f"reward.function={reward}", *tiny, "placement=auto", "name=planned")
    assert summary["steps"] == 2
    folder = tmp_path / "planned"
    report = json.loads((folder / "plan_report.json").read_text())
    assert report["predicted"]["nodes"].keys() == report["ratio"].keys() <= report["measured"]["nodes"].keys()
    assert "actor.update_actor" in report["ratio"] and all(ratio > 0 for ratio in report["ratio"].values())
    assert sum(pool["gpus"] for pool in report["placement"]["pools"].values()) == this_machine().gpus
    refined, _ = load_calibration(folder / "calibration.yaml", CPU_EFFICIENCY)
    assert refined.train_scale != 1.0
