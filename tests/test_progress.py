"""What a run shows and leaves: metrics.jsonl and TensorBoard that survive a resume, lines and tables for people."""

from __future__ import annotations

import io
import json
import math
import sqlite3
import time
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from controller.record.display import Display, key_metrics, sparkline
from controller.record.metrics import MetricsWriter, read_metrics
from controller.record.tracking import new_tracker


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_metrics_are_a_line_a_step_with_times_and_evaluations(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write_evaluation(0, {"heldout/reward": 0.1})
        writer.write(0, {"reward": 0.5}, {"gae": 0.25})
    assert read_metrics(tmp_path) == [
        {"step": 0, "kind": "evaluation", "heldout/reward": 0.1},
        {"step": 0, "reward": 0.5, "time_s/gae": 0.25},
    ]


def test_numbers_that_are_not_finite_become_null_and_are_counted(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": math.nan, "kl": math.inf, "reward": 1.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda word: 1 / 0) == {
        "step": 0, "loss": None, "kl": None, "reward": 1.0, "nonfinite_metrics": 2
    }  # fmt: skip


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(5):
            writer.write(step, {"reward": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # killed while writing
    with MetricsWriter(tmp_path, first_step=3) as writer:
        for step in range(3, 6):
            writer.write(step, {"reward": 10.0 + step})
    assert [(row["step"], row["reward"]) for row in read_metrics(tmp_path)] == [
        (0, 0.0), (1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0)
    ]  # fmt: skip


def test_tensorboard_reads_the_events_and_forgets_what_was_redone(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(5):
            writer.write(step, {"actor/loss": float(step)})
    with MetricsWriter(tmp_path, first_step=3) as writer:
        writer.write(3, {"actor/loss": 30.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("actor/loss")] == [(0, 0), (1, 1), (2, 2), (3, 30)]


def test_steps_that_are_run_again_are_there_once_and_trackers_hear_of_them_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(4):
            writer.write_evaluation(step, {"heldout/reward": 0.1})
            writer.write(step, {"actor/loss": float(step)})
        writer.rewind(2)
        for step in range(2, 5):
            writer.write(step, {"actor/loss": 10.0 + step})
    assert [(row["step"], "kind" in row, row.get("actor/loss")) for row in read_metrics(tmp_path)] == [
        (0, True, None), (0, False, 0), (1, True, None), (1, False, 1), (2, True, None),
        (2, False, 12), (3, False, 13), (4, False, 14),
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("actor/loss")] == [0, 1, 2, 3, 4]


def test_without_a_terminal_there_is_a_line_a_step() -> None:
    console = Console(file=io.StringIO(), width=100)
    with Display("demo", 3, console=console) as display:
        assert not display.live
        display.note("starting")
        for step in range(3):
            display.step(step, {"reward": 0.25 * step, "actor/kl": 0.01, "odd": math.nan}, {"gae": 1.0, "update": 3.0})
        display.summary({"steps": 3, "wall_s": 1.5})
    lines = shown(console).splitlines()
    assert lines[0] == "starting" and lines[2].startswith("step 2/3  reward 0.25  kl 0.01  update 75%  gae 25%")
    assert "left 0:00" in lines[3] and any("wall_s" in line and "1.5" in line for line in lines)
    assert "\x1b" not in shown(console)


def test_on_a_terminal_the_table_shows_trend_and_shares(monkeypatch: object) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    display = Display("demo", 10, console=console)
    for step in range(4):
        display.step(step, {"reward": float(step), "tokens_per_s": 1234.0}, {"generate": 1.0, "update": 1.0})
    console.print(display._table())
    text = shown(console)
    assert "step 4/10" in text and "▁▃▅█" in text and "first 0" in text and "1,234" in text and "50%" in text


def test_startup_is_a_line_a_phase_and_does_not_count_in_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=100)
    with Display("demo", 1000, console=console) as display:
        display.phase("Ray")
        now[0] = 40.0
        display.phase("first step")
        for step in range(3):
            now[0] = 50.0 + 0.5 * step
            display.step(step, {"reward": 0.5}, {})
    lines = shown(console).splitlines()
    assert lines[:2] == ["   0.0 s  Ray", "  40.0 s  first step"]
    assert lines[2].endswith("left --:--"), "start-up and the first step, which warms up, are no pace"
    assert lines[4].startswith("step 3/1000") and lines[4].endswith("left 8:18"), "997 steps of 0.5 s"


def test_on_a_terminal_the_head_shows_what_is_starting_and_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    display = Display("demo", 10, console=console)
    display.phase("actor: vllm engine for generation")
    now[0] = 65.0
    console.print(display._table())
    assert "actor: vllm engine for generation 1:05" in shown(console)


def test_a_quiet_display_still_ends_with_the_summary() -> None:
    console = Console(file=io.StringIO(), width=80)
    with Display("demo", 1, quiet=True, console=console) as display:
        display.note("x")
        display.step(0, {"reward": 1.0}, {})
        assert shown(console) == ""
        display.summary({"reward": "0 -> 1"})
    assert "0 -> 1" in shown(console)


def test_a_number_that_two_nodes_report_is_one_row() -> None:
    reported = {"reward/reward": 0.5, "grpo_advantage/reward": 0.5, "actor/loss": 0.1, "critic/loss": 0.2}
    assert key_metrics(reported) == [
        ("reward", "reward/reward"), ("actor/loss", "actor/loss"), ("critic/loss", "critic/loss")
    ]  # fmt: skip
    assert len(key_metrics(reported | {"grpo_advantage/reward": 0.4})) == 4, "two numbers are two rows"


def test_sparkline_is_the_shape_of_the_last_values() -> None:
    assert sparkline([0, 1, 2, 3], width=3) == "▁▄█"
    assert sparkline([5, 5]) == "▁▁" and sparkline([]) == ""


def test_mlflow_gets_every_step_in_the_runs_folder(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    tracker = new_tracker("mlflow", "a-run", tmp_path, {"seed": 3})
    with MetricsWriter(tmp_path, 0, tracker) as writer:
        writer.write(0, {"gae#2/kl": 0.5, "bad": math.nan})
        writer.write(1, {"gae#2/kl": 0.25})
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("rlhf-dist")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "a-run" and run.info.status == "FINISHED"
    assert [point.value for point in client.get_metric_history(run.info.run_id, "gae-2/kl")] == [0.5, 0.25]


def test_trackio_writes_a_database_in_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if find_spec("trackio") is None:  # not imported here: it reads its folder when it is
        pytest.skip("extra trackio")
    for name in ("TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    told: list[str] = []
    with MetricsWriter(tmp_path, 0, new_tracker("trackio", "a-run", tmp_path, {"seed": 3}, told.append)) as writer:
        writer.write(0, {"actor/loss": 0.5, "bad": math.nan})
        writer.write(1, {"actor/loss": 0.25})
    with closing(sqlite3.connect(tmp_path / "trackio/rlhf-dist.db")) as database:
        rows = list(database.execute("select run_name, step, metrics from metrics order by step"))
        ((config,),) = database.execute("select config from configs")
    assert [(name, step, json.loads(metrics)["actor/loss"]) for name, step, metrics in rows] == [
        ("a-run", 0, 0.5),
        ("a-run", 1, 0.25),
    ]
    assert json.loads(config)["seed"] == 3 and not told
    assert "rackio" not in capfd.readouterr().out, "what a run prints is the run's"
    other = tmp_path / "other"
    with MetricsWriter(other, 0, new_tracker("trackio", "b-run", other, {}, told.append)) as writer:
        writer.write(0, {"actor/loss": 1.0})
    assert (other / "trackio_missed.jsonl").exists(), "nothing goes to another run's folder"
    assert "set TRACKIO_DIR for all of them" in told[0]


def test_swanlab_stays_offline_in_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("swanlab", reason="extra swanlab")
    monkeypatch.delenv("SWANLAB_MODE", raising=False)
    told: list[str] = []
    with MetricsWriter(tmp_path, 0, new_tracker("swanlab", "a-run", tmp_path, {"seed": 3}, told.append)) as writer:
        writer.write(0, {"actor/loss": 0.5, "bad": math.nan})
        writer.write(1, {"actor/loss": 0.25})
    assert not told and not (tmp_path / "swanlab_missed.jsonl").exists()
    written = b"".join(file.read_bytes() for file in tmp_path.glob("swanlab/run-*/**/*") if file.is_file())
    assert b"actor/loss" in written


def test_wandb_stays_offline_in_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with MetricsWriter(tmp_path, 0, new_tracker("wandb", "a-run", tmp_path, {"seed": 3})) as writer:
        writer.write(0, {"reward": 0.5})
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60
    while b"reward" not in record.read_bytes():  # on a busy machine wandb's own service writes after finish()
        assert time.monotonic() < deadline, "the metric never reached wandb's file"
        time.sleep(0.2)
