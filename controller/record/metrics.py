"""Metrics of a run on disk: one JSON line a step, and the same rows on their way to TensorBoard and a tracker."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from controller.record.outbox import Outbox
from controller.record.prometheus import PrometheusEndpoint
from controller.record.tracking import TensorBoard

NAME = "metrics.jsonl"
INTERRUPTED_S = 3.0
"""Longest wait for each tracker after Ctrl-C."""


class MetricsWriter:
    """Writes `metrics.jsonl` and `tensorboard/` in a run's folder; a context manager.

    A run that continues at `first_step` drops the lines of that step and later ones, and a line that was
    cut by a crash, so that no step is there twice; TensorBoard is told to forget the same steps.
    """

    def __init__(
        self,
        folder: str | Path,
        first_step: int = 0,
        tracker: Outbox | None = None,
        tell: Callable[[str], None] = print,
        endpoint: PrometheusEndpoint | None = None,
    ) -> None:
        """tell: shows people a line, where TensorBoard's files cannot be written. endpoint: is told as trackers are."""
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / NAME
        if faulty := _drop_lines(self._path, first_step):
            tell(f"{self._path}: {faulty} faulty or cut lines of the earlier run are left out")
        self._file = self._path.open("a", encoding="utf-8")
        board = Outbox("tensorboard", lambda: TensorBoard(self._folder / "tensorboard", first_step), self._folder, tell)
        self._trackers = [one for one in (board, tracker, endpoint) if one is not None]
        self._told: dict[str, int] = {}
        """Kind of line -> the last step that trackers were told of."""

    def write(self, step: int, metrics: Mapping[str, float], node_seconds: Mapping[str, float] | None = None) -> None:
        """One step; `node_seconds` becomes `time_s/NODE`.

        A metric that is not finite is written as null and counted in `nonfinite_metrics`.
        """
        self._write(step, {**metrics, **{f"time_s/{name}": s for name, s in (node_seconds or {}).items()}}, {})

    def write_evaluation(self, steps_done: int, metrics: Mapping[str, float]) -> None:
        """An evaluation after `steps_done` steps; its line has `"kind": "evaluation"`."""
        self._write(steps_done, metrics, {"kind": "evaluation"})

    def rewind(self, steps_done: int) -> None:
        """Forget what comes after `steps_done` steps, which will be run again: no step is there twice. Trackers keep
        what they were told first."""
        self._file.close()
        _drop_lines(self._path, steps_done, evaluations_to=steps_done)
        self._file = self._path.open("a", encoding="utf-8")

    def _write(self, step: int, metrics: Mapping[str, float], marks: Mapping[str, str]) -> None:
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        row: dict[str, Any] = {"step": step, **marks, **{name: finite.get(name) for name in metrics}}
        if len(finite) < len(metrics):
            row["nonfinite_metrics"] = len(metrics) - len(finite)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        told = self._told.setdefault(marks.get("kind", ""), step - 1)
        if step > told:
            self._told[marks.get("kind", "")] = step
            for tracker in self._trackers:
                tracker.log(step, finite)

    def close(self, wait_s: float | None = None) -> None:
        """Flush and close all, as `Outbox.close`; calling it again does nothing."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close(wait_s)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(INTERRUPTED_S if kind is not None and issubclass(kind, KeyboardInterrupt) else None)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """All lines of a run's `metrics.jsonl`, in order; one that was cut is left out."""
    path = Path(folder) / NAME
    rows = [_parsed(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    return [row for row in rows if row is not None]


def _drop_lines(path: Path, first_step: int, evaluations_to: int = -1) -> int:
    """Keep the lines of steps before `first_step`, and of evaluations after at most `evaluations_to` steps; returns how
    many are no lines of metrics."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines()
    rows = [_parsed(line) for line in lines]
    kept = [
        line
        for line, row in zip(lines, rows, strict=True)
        if row is not None and (row["step"] < first_step or ("kind" in row and row["step"] <= evaluations_to))
    ]
    # Written beside and moved: a crash here leaves the old file whole.
    beside = path.with_suffix(".tmp")
    beside.write_bytes(b"".join(line + b"\n" for line in kept))
    os.replace(beside, path)
    return rows.count(None)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
