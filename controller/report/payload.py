"""All that a page says of one run, as plain data. Rollouts are listed here; their rows are blocks of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import yaml

from controller.record.run_summary import for_people
from controller.report.curves import ORDER, columns, curve, find_spikes, short, topic_of
from controller.report.drawing import drawing
from controller.report.health import Numbers, signals
from controller.report.run_files import RunFiles

SLICES = 20_000
"""Most slices of a timeline: the last ones are kept."""


def run_payload(files: RunFiles, rollouts: Sequence[Mapping[str, Any]], unreadable: Sequence[str]) -> dict[str, Any]:
    """rollouts: entries of its blocks (`rollouts.Block.entry`). unreadable: rollout files that are left out."""
    steps, series = [row["step"] for row in files.steps], columns(files.steps)
    done, heldout = [row["step"] for row in files.evaluations], columns(files.evaluations)
    repeated = [(one["step"], one["repeated"]) for one in rollouts if not one["part"] and one["repeated"] is not None]
    numbers = Numbers(steps=steps, series=series, heldout=heldout, repeated=repeated)
    topics: dict[str, dict[str, Any]] = {topic: {} for topic in ORDER}
    for name, values in series.items():
        topics[topic_of(name)][name] = curve(steps, values)
    for name, values in heldout.items():
        topics[topic_of(name)][name] = {"x": done} | curve(done, values)
    config = yaml.safe_load(files.config) if files.config else {}
    return {
        "name": files.name,
        "facts": _facts(files, config),
        "ended": files.summary is not None,
        "steps": steps,
        "topics": {topic: found for topic, found in topics.items() if found},
        "health": [asdict(signal) for signal in signals(numbers)],
        "spikes": [asdict(spike) for spike in find_spikes(steps, series)],
        "nodes": _node_times(series, files.summary or {}),
        "timeline": None if files.trace is None else _timeline(files.trace),
        "graph": None if files.graph is None else drawing(files.graph),
        "node_of": {} if files.graph is None else files.graph.get("metrics", {}),
        "plan": files.plan,
        "config": files.config,
        "rollouts": [dict(one) for one in rollouts],
        "notes": _notes(files, rollouts, unreadable),
    }


def _facts(files: RunFiles, config: Mapping[str, Any]) -> list[list[str]]:
    if files.summary is not None:
        return [*([label, str(value)] for label, value in for_people(files.summary).items()), *_looked_at(files)]
    done = files.steps[-1]["step"] + 1 if files.steps else 0
    return [
        ["state", "no summary yet: it goes on, or ended before its last step"],
        ["steps", f"{done} of {config.get('steps', '?')}"],
        ["folder", str(files.folder)],
        *_looked_at(files),
    ]


def _looked_at(files: RunFiles) -> list[list[str]]:
    """Traces and inputs that the run has kept."""
    rows = [
        [folder, "; ".join(f"{process}: {', '.join(nodes)}" for process, nodes in processes.items())]
        for folder, processes in files.profiles.items()
    ]
    if files.inputs:
        rows.append(["inputs kept", f"of step {', '.join(map(str, files.inputs))}: rlhf-dist replay {files.folder}"])
    return rows


def _notes(files: RunFiles, rollouts: Sequence[Mapping[str, Any]], unreadable: Sequence[str]) -> list[str]:
    shown, rows = sum(one["shown"] for one in rollouts), sum(one["rows"] for one in rollouts)
    notes = []
    if shown < rows:
        notes.append(
            f"{shown:,} of {rows:,} rollouts are in this page: the first rows of each step; the files have all"
        )
    if unreadable:
        notes.append(f"not readable, left out: {', '.join(unreadable)}")
    if files.graph is None:
        notes.append("there is no graph.json: the run is of an older version, or has not begun")
    return notes


def _node_times(series: Mapping[str, Sequence[float | None]], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Seconds of each node: median of a step, all together, and on the critical path of a step."""
    longest = summary.get("critical_path_s") or {}
    found = []
    for name, values in series.items():
        there = [value for value in values if value is not None]
        if name.startswith("time_s/") and there:
            node = name.removeprefix("time_s/")
            found.append(
                {
                    "node": node,
                    "median_s": short(median(there)),
                    "total_s": short(sum(there)),
                    "critical_s": longest.get(node),
                }
            )
    return sorted(found, key=lambda one: -one["total_s"])


def _timeline(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Slices as rows of numbers: [row, name, start s, seconds, step or -1, tokens, bytes]; a row is a pool's lane."""
    pools = {event["pid"]: event["args"]["name"] for event in events if event.get("ph") == "M"}
    every = [event for event in events if event.get("ph") == "X"]
    slices = every[-SLICES:] if len(every) <= SLICES else sorted(every, key=lambda one: one["ts"])[-SLICES:]
    start = min((one["ts"] for one in slices), default=0)
    rows = sorted({(one["pid"], one["tid"]) for one in slices})
    names = list(dict.fromkeys(one["name"] for one in slices))
    return {
        "rows": [f"{pools.get(pid, pid)}" + (f" ({lane + 1})" if lane else "") for pid, lane in rows],
        "names": names,
        "left_out": len(every) - len(slices),
        "slices": [
            [
                rows.index((one["pid"], one["tid"])),
                names.index(one["name"]),
                round((one["ts"] - start) / 1e6, 6),
                round(one["dur"] / 1e6, 6),
                one["args"].get("step", -1),
                one["args"].get("tokens", 0),
                one["args"].get("bytes", 0),
            ]
            for one in slices
        ],
    }
