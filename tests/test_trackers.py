"""A tracker never ends or delays a run: an MLflow server that dies, stops or is not there, a folder that cannot be."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from controller.record.metrics import MetricsWriter, read_metrics
from controller.record.outbox import CLOSE_S
from controller.record.tracking import new_tracker

ROOT = Path(__file__).parents[1]


@dataclass
class Server:
    """An MLflow server in a process of its own, and what it was given."""

    uri: str
    file: Path
    process: subprocess.Popen[str] | None = None

    def steps(self) -> list[int]:
        return sorted(
            {int(line.split()[0]) for line in self.file.read_text().splitlines()} if self.file.exists() else []
        )

    def await_step(self, step: int) -> None:
        deadline = time.monotonic() + 60
        while step not in self.steps() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert step in self.steps(), f"step {step} never arrived"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = Server(f"http://127.0.0.1:{port}", tmp_path / "given.txt")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    command = [sys.executable, "-m", "tests.mlflow_server", str(port), str(made.file)]
    made.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert made.process.stdout is not None and made.process.stdout.readline() == "up\n"
    yield made
    made.process.kill()
    made.process.wait()


@dataclass
class Told:
    """What people saw, and the longest that a step had to wait for its metrics to be written."""

    lines: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def write(self, writer: MetricsWriter, step: int) -> None:
        started = time.monotonic()
        writer.write(step, {"reward": float(step)})
        self.longest_s = max(self.longest_s, time.monotonic() - started)


def missed(folder: Path, name: str = "mlflow") -> list[int]:
    file = folder / f"{name}_missed.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def test_every_row_reaches_a_server_that_answers(server: Server, tmp_path: Path) -> None:
    told = Told()
    tracker = new_tracker("mlflow", "a-run", tmp_path, {"seed": 1}, told.lines.append)
    with MetricsWriter(tmp_path, 0, tracker, told.lines.append) as writer:
        for step in range(5):
            told.write(writer, step)
    assert server.steps() == [0, 1, 2, 3, 4] and not missed(tmp_path) and not told.lines


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "stops answering"])
def test_a_server_lost_in_mid_run_is_said_once_and_what_it_misses_is_kept(
    server: Server, tmp_path: Path, end: signal.Signals
) -> None:
    told = Told()
    tracker = new_tracker("mlflow", "a-run", tmp_path, {"seed": 1}, told.lines.append)
    with MetricsWriter(tmp_path, 0, tracker, told.lines.append) as writer:
        told.write(writer, 0)
        server.await_step(0)
        assert server.process is not None
        os.kill(server.process.pid, end)
        for step in range(1, 6):
            told.write(writer, step)
        closing = time.monotonic()
    assert time.monotonic() - closing < CLOSE_S + 10 and told.longest_s < 1
    assert missed(tmp_path) == [1, 2, 3, 4, 5]
    (line,) = told.lines
    assert line.startswith("mlflow fails: ") and str(tmp_path / "mlflow_missed.jsonl") in line and "\n" not in line
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(6))


def test_a_server_that_is_not_there_at_the_start_does_not_hold_the_run_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    told = Told()
    started = time.monotonic()
    tracker = new_tracker("mlflow", "a-run", tmp_path, {"seed": 1}, told.lines.append)
    assert time.monotonic() - started < 1
    with MetricsWriter(tmp_path, 0, tracker, told.lines.append) as writer:
        told.write(writer, 0)
    assert missed(tmp_path) == [0] and len(told.lines) == 1 and told.longest_s < 1


def test_a_tracker_that_never_returns_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import controller.record.outbox as outbox

    monkeypatch.setattr(outbox, "CLOSE_S", 0.5)
    lines: list[str] = []
    box = outbox.Outbox("slow", lambda: time.sleep(60), tmp_path, lines.append)  # type: ignore[arg-type,return-value,func-returns-value]
    for step in range(3):
        box.log(step, {"reward": 1.0})
    started = time.monotonic()
    box.close()
    box.close()
    assert time.monotonic() - started < 10 and missed(tmp_path, "slow") == [0, 1, 2]
    assert len(lines) == 1 and "slow fails: no answer within 0.5 s; the run goes on" in lines[0]


def test_a_tracker_that_comes_back_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import controller.record.outbox as outbox

    monkeypatch.setattr(outbox, "RETRY_S", 0.0)
    (tmp_path / "board").write_text("a file where the folder has to be")
    given: list[int] = []

    class File:
        def log(self, step: int, metrics: object) -> None:
            (tmp_path / "board" / f"{step}").write_text("x")
            given.append(step)

        def close(self) -> None:
            pass

    box = outbox.Outbox("file", File, tmp_path, print)
    box.log(0, {})
    deadline = time.monotonic() + 20
    while missed(tmp_path, "file") != [0] and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "board").unlink()
    (tmp_path / "board").mkdir()
    box.log(1, {})
    box.close()
    assert given == [1] and missed(tmp_path, "file") == [0]


def test_tensorboard_that_cannot_write_is_a_line_and_the_metrics_are_there(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder has to be")
    told = Told()
    with MetricsWriter(tmp_path, 0, None, told.lines.append) as writer:
        told.write(writer, 0)
    assert missed(tmp_path, "tensorboard") == [0] and told.lines[0].startswith("tensorboard fails: ")
    assert read_metrics(tmp_path) == [{"step": 0, "reward": 0.0}]
