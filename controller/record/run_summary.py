"""A run's summary for people: one screen with what was learned, how fast, and where everything is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controller.record.display import key_metrics

LONGEST = 3
"""Nodes of the critical path that are named."""


def for_people(summary: Mapping[str, Any]) -> dict[str, object]:
    """Rows of the table at the end: metrics from the first to the last step, held-out ones, speed, files."""
    rows: dict[str, object] = {
        "recipe": f"{summary['recipe']}, {summary['steps']} steps, seed {summary['seed']}",
        "time": f"{summary['wall_s']:.4g} s in all, {summary['step_s']:.3g} s a step, "
        f"{summary['tokens_per_s']:,.0f} tokens/s",
    }
    if startup := summary.get("startup_s"):
        rows["start-up"] = f"{sum(startup.values()):.1f} s to the end of the first step: " + ", ".join(
            f"{part} {seconds:.1f}" for part, seconds in startup.items()
        )
    if recoveries := summary.get("recoveries"):
        pools = ", ".join(sorted({pool for one in recoveries for pool in one["pools"]}))
        rows["recoveries"] = f"{len(recoveries)} in {summary['recovery_s']:.4g} s, of {pools}"
    first, last = summary.get("first") or {}, summary.get("last") or {}
    for label, name in key_metrics(last):
        if name != "tokens_per_s" and name in first:
            rows[label] = f"{first[name]:.4g} -> {last[name]:.4g}"
    evaluations = summary.get("evaluations") or []
    for label, name in key_metrics(evaluations[0] if evaluations else {}):
        if name in evaluations[-1]:
            values = " -> ".join(f"{one[name]:.4g}" for one in _ends(evaluations))
            rows[f"held-out {label.removeprefix('heldout/')}"] = values
    if summary.get("idle_share"):
        rows["idle share"] = ", ".join(f"{pool} {share:.0%}" for pool, share in summary["idle_share"].items())
    if summary.get("critical_path_s"):
        longest = list(summary["critical_path_s"].items())[:LONGEST]
        rows["critical path"] = ", ".join(f"{node} {seconds:.3g} s" for node, seconds in longest)
    return rows | _files(Path(summary["folder"]))


def _ends(evaluations: list[dict[str, float]]) -> list[dict[str, float]]:
    return [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations


def _files(folder: Path) -> dict[str, object]:
    there = ("models", "checkpoints", "rollouts", "summary.json")
    kept = ", ".join(name for name in there if (folder / name).exists())
    return {
        "folder": f"{folder} ({kept})",
        "curves": f"tensorboard --logdir {shlex.quote(str(folder / 'tensorboard'))}",
    }
