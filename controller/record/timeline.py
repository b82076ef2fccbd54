"""What a run did when: Chrome/Perfetto trace, idle share of each pool, critical path, and a drawing.

trace.json   one row per pool, a slice per node (args: step, tokens, bytes); CPU work and the controller's
             own (evaluation, checkpoints) have rows of their own; open it at ui.perfetto.dev
timeline     the same as PNG: rlhf-dist timeline runs/NAME
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controller.execution.critical_path import critical_path, seconds_on_path
from controller.execution.executor import Finished
from rlhf_dist.dataflow.graph import Dataflow, Node
from rlhf_dist.typed import ConfigError

HOST, CONTROLLER = "host", "controller"
PoolsOf = Callable[[Node], tuple[str, ...]]


@dataclass
class Timeline:
    """Collects what finished; times are seconds on one clock."""

    dataflow: Dataflow
    pools_of: PoolsOf
    finished: list[Finished] = field(default_factory=list)
    paused: list[tuple[str, float, float]] = field(default_factory=list)
    """(what, start, end) of the controller's own work, in which no node runs."""

    def events(self) -> list[dict[str, Any]]:
        """Chrome trace events, microseconds."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for one in self.finished:
            args = {"step": one.step, "tokens": one.tokens, "bytes": one.nbytes}
            args |= {"interrupted": True} if one.interrupted else {}
            for pool in self._pools(one) or (HOST,):
                rows.setdefault(pool, []).append(_slice(one.node, one.started_s, one.ended_s, args))
        for what, start, end in self.paused:
            rows.setdefault(CONTROLLER, []).append(_slice(what, start, end, {}))
        events: list[dict[str, Any]] = []
        for pid, (pool, slices) in enumerate(sorted(rows.items(), key=lambda row: (row[0] in (HOST, CONTROLLER), row))):
            events.append({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": pool}})
            for lane, one_slice in _lanes(slices):
                events.append({**one_slice, "pid": pid, "tid": lane, "cat": pool})
        return events

    def idle_share(self) -> dict[str, float]:
        """Pool -> share of the steps' time in which it did nothing; evaluations and checkpoints do not count."""
        if not self.finished:
            return {}
        start, end = min(one.started_s for one in self.finished), max(one.ended_s for one in self.finished)
        total = end - start - self._paused_s(start, end)
        busy: dict[str, float] = {}
        for one in self.finished:
            for pool in self._pools(one):
                busy[pool] = busy.get(pool, 0.0) + one.ended_s - one.started_s
        return (
            {pool: round(max(0.0, 1 - seconds / total), 4) for pool, seconds in sorted(busy.items())} if total else {}
        )

    def critical_path(self) -> dict[str, float]:
        """Node -> seconds per step on the chain that made the run as long as it was; `waiting` for gaps.

        Evaluations and checkpoints are no gaps.
        """
        if not self.finished:
            return {}
        steps = len({one.step for one in self.finished})
        total = seconds_on_path(critical_path(self.dataflow, self.finished, self.pools_of))
        first, last = min(one.started_s for one in self.finished), max(one.ended_s for one in self.finished)
        total["waiting"] = max(0.0, total["waiting"] - self._paused_s(first, last))
        return {node: round(seconds / steps, 4) for node, seconds in total.items()}

    def _paused_s(self, start: float, end: float) -> float:
        return sum(min(b, end) - max(a, start) for _, a, b in self.paused if b > start and a < end)

    def _pools(self, one: Finished) -> tuple[str, ...]:
        return self.pools_of(self.dataflow[one.node])


def draw(run_folder: Path, target: Path | None = None, steps: Sequence[int] | None = None) -> Path:
    """Draw a run's trace.json as PNG (default RUN/timeline.png), all steps or those given; returns the file.

    Raises ConfigError where there is no trace, or nothing of the steps asked for.
    """
    source = run_folder / "trace.json"
    if not source.is_file():
        raise ConfigError(f"{source} does not exist; give the folder of a run that has ended, e.g. runs/ppo")
    events = json.loads(source.read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    slices = [event for event in events if event["ph"] == "X"]
    if steps is not None:
        slices = [one for one in slices if one["args"].get("step") in steps]
    if not slices:
        raise ConfigError(f"{source} has no slices of these steps; leave --steps out to draw all")
    target = target or run_folder / "timeline.png"
    _plot(slices, names, target, title=run_folder.name)
    return target


def _plot(slices: list[dict[str, Any]], names: dict[int, str], target: Path, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    start = min(one["ts"] for one in slices)
    rows = sorted({(one["pid"], one["tid"]) for one in slices})
    nodes = list(dict.fromkeys(one["name"] for one in slices))
    figure = Figure(figsize=(14, 1.6 + 0.45 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for node in nodes:
        color = f"C{nodes.index(node) % 10}"
        for one in (one for one in slices if one["name"] == node):
            left, width = (one["ts"] - start) / 1e6, one["dur"] / 1e6
            at = rows.index((one["pid"], one["tid"]))
            hatch = "//" if nodes.index(node) >= 10 else None
            axes.barh(at, width, left=left, color=color, edgecolor="white", linewidth=0.4, hatch=hatch, label=node)
            if "step" in one["args"] and width > 0.02 * max(1e-9, (slices[-1]["ts"] - start) / 1e6):
                axes.text(left + width / 2, at, str(one["args"]["step"]), ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [names[pid] if lane == 0 else "" for pid, lane in rows])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(f"{title}: one row per pool, numbers are steps")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(
        handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False
    )
    figure.savefig(target, dpi=120)


def _slice(name: str, start_s: float, end_s: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "X", "ts": round(start_s * 1e6), "dur": round((end_s - start_s) * 1e6), "args": args}


def _lanes(slices: Iterable[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(lane, slice): slices that overlap are in different lanes."""
    ends: list[int] = []
    placed = []
    for one in sorted(slices, key=lambda one: int(one["ts"])):
        lane = next((lane for lane, end in enumerate(ends) if end <= one["ts"] + 1), len(ends))
        ends[lane : lane + 1] = [one["ts"] + one["dur"]]
        placed.append((lane, one))
    return placed
