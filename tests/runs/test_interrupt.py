"""Ctrl-C and a scheduler's SIGTERM end a run within 10 s and leave no process and no shared-memory file behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from controller.lifecycle.preemption import EXIT_CODE

CLI = str(Path(sys.executable).with_name("rlhf-dist"))


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_quickly_and_leaves_nothing(
    model: Path, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    before = shared_memory()
    reward = f"{Path(__file__).parent}/digit_reward.py:digits"
    command = [CLI, "run", "grpo", "task=none", f"model.path={model}", f"data.train.path={data}", "steps=100000"]
    command += [f"reward.function={reward}", f"output.root={tmp_path}", "data.prompts_per_step=4"]
    # A Ray of its own, as a user has it; its sockets need a short path.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    output = tmp_path / "output.txt"
    with output.open("w") as log:
        running = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 150
        while "step 2/" not in output.read_text() and time.monotonic() < deadline and running.poll() is None:
            time.sleep(0.2)
        assert "step 2/" in output.read_text(), output.read_text()[-2000:]
        family = descendants(running.pid)
        assert len(family) > 3, "Ray and the workers are children of the run"
        started = time.monotonic()
        os.killpg(running.pid, number)  # as a terminal and `timeout` do
        assert running.wait(timeout=30) == (EXIT_CODE if number == signal.SIGTERM else 130)
        assert time.monotonic() - started < 10
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive, f"left behind: {[process.cmdline() for process in alive if process.is_running()]}"
        assert shared_memory() <= before
    finally:
        if running.poll() is None:
            running.kill()
