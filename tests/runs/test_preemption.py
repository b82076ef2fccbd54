"""A notice from outside: the step ends, a checkpoint is there, and a second run goes on to the same weights."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from controller.cluster.local import local_launch
from controller.lifecycle.checkpoint import list_checkpoints
from controller.lifecycle.preemption import NOTICE_FILE, Notices, Preempted
from controller.lifecycle.run import run
from controller.record.display import Display
from controller.record.metrics import read_metrics
from rlhf_dist.checks import check_launch
from rlhf_dist.compose import compose


class Asking(Display):
    """Does something when a step is shown."""

    at: Mapping[int, Callable[[], object]]

    def step(self, step: int, metrics: Mapping[str, float], node_seconds: Mapping[str, float]) -> None:
        self.at.get(step, lambda: None)()


def sends(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture
def sft(model: Path, data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Four steps in this process; at: what happens when a step is shown. Returns the run's folder."""

    def start(name: str, *overrides: str, at: Mapping[int, Callable[[], object]] | None = None) -> Path:
        settings = ["task=none", f"model.path={model}", "model.dtype=float32", f"data.train.path={data}", "steps=4"]
        own = [f"output.root={tmp_path}", f"name={name}", "data.prompts_per_step=4", *overrides]
        launch = local_launch(compose("sft", [*settings, *own]), own)
        check_launch(launch)
        with Asking("sft", 4, quiet=True) as display:
            display.at = at or {}
            run(launch, display, local=True)
        return tmp_path / name

    return start


def steps_saved(folder: Path) -> list[int]:
    return [one.step for one in list_checkpoints(folder / "checkpoints")]


def weights(folder: Path) -> dict[str, bytes]:
    found = {file.name: file.read_bytes() for file in (folder / "models/actor").glob("*.safetensors")}
    assert found
    return found


def test_a_notice_saves_and_the_run_goes_on_to_the_same_weights(sft: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(Preempted, match=r"^SIGTERM after 3 steps; the last checkpoint is of step 3; .*resume=auto"):
        sft("asked", at={0: sends(signal.SIGUSR1), 2: sends(signal.SIGTERM)})
    assert steps_saved(tmp_path / "asked") == [1, 3], "SIGUSR1 saves and goes on"
    folder = sft("asked", "resume=auto")
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 2, 3]
    assert weights(folder) == weights(sft("whole"))


def test_a_notice_file_is_a_notice_and_one_of_an_earlier_start_is_none(
    sft: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "notice"
    file.touch()
    os.utime(file, (1.0, 1.0))
    monkeypatch.setenv(NOTICE_FILE, str(file))
    monkeypatch.setattr("controller.lifecycle.preemption.LOOK_S", 0.0)
    with pytest.raises(Preempted, match=rf"the notice file {file} after 2 steps"):
        sft("file", "output.save_model=false", at={1: file.touch})
    assert steps_saved(tmp_path / "file") == [2]


def test_two_notices_end_at_once(sft: Callable[..., Path], tmp_path: Path) -> None:
    def twice() -> None:
        sends(signal.SIGTERM)()
        sends(signal.SIGTERM)()

    with pytest.raises(KeyboardInterrupt) as caught:
        sft("twice", at={0: twice})
    assert not isinstance(caught.value, Preempted)
    assert steps_saved(tmp_path / "twice") == []


def test_a_step_that_does_not_end_is_abandoned_after_half_of_the_time() -> None:
    notices = Notices(None, notice_s=0.2)
    with notices.heard():
        with pytest.raises(Preempted, match="no step under way"):
            os.kill(os.getpid(), signal.SIGTERM)
        again = Notices(None, notice_s=0.2)
        with again.heard():
            again.running = True
            os.kill(os.getpid(), signal.SIGTERM)
            again.check()
            time.sleep(0.11)
            with pytest.raises(Preempted, match="SIGTERM"):
                again.check()
