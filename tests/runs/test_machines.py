"""PPO over several machines, whose host names resolve to loopback and which share files or do not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from controller.record.metrics import read_metrics
from tests.runs.machines import Machines, refusal

REWARD = f"{Path(__file__).parent}/digit_reward.py:digits"


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Three, with room for two processes on the first and for one on each of the others."""
    why_not = refusal()
    if why_not is not None:
        assert "CI" not in os.environ, f"a run of the whole suite must include machines: {why_not}"
        pytest.skip(why_not)
    with Machines(tmp_path_factory.mktemp("machines"), cpus=(2, 1, 1)) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path, model: Path, data: Path) -> Path:
    """Runs, and a copy of model and data, in folders of their own that may be hidden."""
    for name, source in (("model", model), ("data", data.parent)):
        (tmp_path / name).mkdir()
        for file in source.iterdir():
            if file.is_file():
                os.link(file, tmp_path / name / file.name)
    return tmp_path


def ppo(machines: Machines, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A run of two steps that the first machine starts."""
    settings = [
        "task=none",
        "steps=2",
        f"model.path={folder}/model",
        f"data.train.path={folder}/data/sums.jsonl",
        "data.prompts_per_step=4",
        f"reward.function={REWARD}",
        "actor.rollout.max_response_tokens=6",
        "algorithm.mini_batches=2",
        "placement.host_processes=1",
        f"output.root={folder}/runs",
        "ray.address=auto",
        "ray.call_timeout_s=90",
        *overrides,
    ]
    return machines.run(0, sys.executable, "-m", "controller.commands.cli", "run", "ppo", *settings)


TOGETHER = ("placement.pools={main: {slots: 1, nodes: 2}}", "actor.rollout.engine=transformers")
APART = (
    "~placement.pools.main",
    "placement.pools={train: {slots: 1, nodes: 2}, rollout: {slots: 1}}",
    "placement.roles={default: train}",
    "placement.rollout=rollout",
    "actor.rollout.kv_cache_bytes=16777216",
    "output.save_model=false",
)


@contextmanager
def hidden(machines: Machines, folder: Path) -> Iterator[None]:
    """Only the machine that starts runs has the folder's files."""
    for machine in (1, 2):
        machines.hide(machine, folder)
    try:
        yield
    finally:
        for machine in (1, 2):
            machines.show(machine, folder)


def places(folder: Path) -> dict[str, str]:
    """Log of a rank -> the address it ran at and gloo's interface there."""
    found = {}
    for log in (folder / "runs/ppo/logs").glob("*.log"):
        if said := re.search(r"on (\S+), gloo over (\S+)", log.read_text()):
            found[log.stem] = " ".join(said.groups())
    return found


def test_ppo_colocated_over_two_machines(machines: Machines, folder: Path) -> None:
    name = machines.run(1, sys.executable, "-c", "import socket; print(socket.gethostbyname(socket.gethostname()))")
    assert name.stdout.strip() == "127.0.1.1"  # where gloo would listen if it was left alone
    with hidden(machines, Path(REWARD).parent):  # a user's file travels by value
        done = ppo(machines, folder, *TOGETHER)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = folder / "runs/ppo"
    assert len(read_metrics(run)) == 2
    assert list((run / "models/actor").glob("*.safetensors")) and (run / "checkpoints/step_2").is_dir()
    where = places(folder)
    assert sorted(where) == ["main-0", "main-1"] and len(set(where.values())) == 2, where
    assert all(re.fullmatch(r"10\.87\.0\.\d eth0", place) for place in where.values()), where


def test_ppo_over_three_machines_generates_on_another_than_it_trains_on(machines: Machines, folder: Path) -> None:
    done = ppo(machines, folder, *APART)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(read_metrics(folder / "runs/ppo")) == 2
    where = places(folder)
    trains, generates = {where["train-0"], where["train-1"]}, where["rollout-0"]
    assert len(trains) == 2 and all(place.endswith("eth0") for place in trains), where
    assert generates.endswith(" lo") and generates.split()[0] not in {place.split()[0] for place in trains}, where
    summary = json.loads((folder / "runs/ppo/summary.json").read_text())
    assert summary["steps"] == 2


def test_a_run_folder_that_another_machine_does_not_see_is_refused(machines: Machines, folder: Path) -> None:
    (folder / "runs").mkdir()
    with hidden(machines, folder / "runs"):
        done = ppo(machines, folder, *TOGETHER)
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode != 0 and len(lines) == 1, done.stdout[-2000:] + done.stderr[-2000:]
    text = (
        r"run's folder \S+/ppo must be on a file system that all its nodes share: on node (10\S+) .*; set output.root"
    )
    found = re.search(text, lines[0])
    assert found and found[1] != machines.address(0), lines
