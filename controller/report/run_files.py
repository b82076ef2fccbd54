"""The folder of a run as data. What is not there yet is None; nothing of a folder is executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controller.execution.looking import PROFILES, TRACE
from controller.lifecycle.plan_feedback import REPORT
from controller.lifecycle.run_folder import is_run
from controller.record import graph_file
from controller.record.metrics import read_metrics
from rlhf_dist.saved_calls import saved_steps
from rlhf_dist.typed import ConfigError

EVALUATION = "evaluation"


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run has written so far."""

    folder: Path
    steps: list[dict[str, Any]]
    """Lines of metrics.jsonl, one a step; steps count from 0."""
    evaluations: list[dict[str, Any]]
    """Its other lines; their `step` is how many steps were done."""
    config: str = ""
    summary: dict[str, Any] | None = None
    trace: list[dict[str, Any]] | None = None
    plan: dict[str, Any] | None = None
    graph: dict[str, Any] | None = None
    profiles: Mapping[str, Mapping[str, list[str]]] = field(default_factory=dict)
    """Folder of a profiled step -> process -> nodes of which there are traces."""
    inputs: Mapping[int, list[str]] = field(default_factory=dict)
    """Step -> nodes whose inputs were kept."""

    @property
    def name(self) -> str:
        """The folder's name, which the run has too."""
        return self.folder.resolve().name


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder. Raises ConfigError where there is none, or where a file in it is not what it should be."""
    if not folder.is_dir() or not is_run(folder):
        stages = " (of stages, give the folder of one)" if (folder / "summary.json").is_file() else ""
        raise ConfigError(f"{folder} is not the folder of a run; give one, e.g. runs/ppo{stages}")
    rows = read_metrics(folder)
    trace = _json(folder / "trace.json")
    return RunFiles(
        folder=folder,
        steps=[row for row in rows if row.get("kind") != EVALUATION],
        evaluations=[row for row in rows if row.get("kind") == EVALUATION],
        config=_text(folder / "config.yaml"),
        summary=_json(folder / "summary.json"),
        trace=None if trace is None else list(trace.get("traceEvents", [])),
        plan=_json(folder / REPORT),
        graph=_json(folder / graph_file.NAME),
        profiles=_profiles(folder),
        inputs=saved_steps(folder),
    )


def _profiles(folder: Path) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = {}
    traces = (folder / PROFILES).glob(f"step_*/*/[!.]*{TRACE}")
    for trace in sorted(traces, key=lambda trace: (trace.parent, trace.name.removesuffix(TRACE))):
        of_step = found.setdefault(str(trace.parents[1].relative_to(folder)), {})
        of_step.setdefault(trace.parent.name, []).append(trace.name.removesuffix(TRACE))
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file. All of these are written atomically."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); move it away to see the rest of the run") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must be a JSON object; move it away to see the rest of the run")
    return found
