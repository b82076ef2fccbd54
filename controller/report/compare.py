"""What differs between runs: settings, and the numbers they ended with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from controller.report.curves import columns, short
from controller.report.run_files import RunFiles

EXPECTED = ("name", "output.root", "resume")
"""Settings that differ between any two runs."""


def settings_that_differ(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """`key` and its value in each run, as YAML, for settings that are not the same in all; `(none)` where a run has no
    such setting."""
    flat = [_flat(yaml.safe_load(run.config) or {}) if run.config else {} for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    found = []
    for key in keys:
        values = [one.get(key, "(none)") for one in flat]
        if key not in EXPECTED and len(set(values)) > 1:
            found.append({"key": key, "values": values})
    return found


def final_numbers(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """`metric` and its last value in each run; None where a run has none. Held-out ones first."""
    found: list[dict[str, Any]] = []
    for rows in ([run.evaluations for run in runs], [run.steps for run in runs]):
        series = [columns(one) for one in rows]
        for metric in dict.fromkeys(name for one in series for name in one):
            if not metric.startswith("time_s/"):
                found.append({"metric": metric, "values": [_last(one.get(metric, ())) for one in series]})
    return found


def _last(values: Sequence[float | None]) -> float | None:
    return next((short(value) for value in reversed(values) if value is not None), None)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for key, value in data.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            out |= _flat(value, f"{path}.")
        else:
            out[path] = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    return out
