"""Runs of whole recipes on a real Ray, shared between the tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from controller.cluster.local import local_launch
from controller.lifecycle.run import run
from controller.record.display import Display
from rlhf_dist.checks import check_launch
from rlhf_dist.planner.launch import compose_planned
from tests.runs.warm_cluster import WarmCluster
from tests.tiny import save_llama

SUMS = [(a, b) for a in range(10) for b in range(10)]


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One Ray for all tests of this folder."""
    ray.init(
        address="local",  # never one that another test has started meanwhile
        num_cpus=24,
        object_store_memory=256 << 20,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untied Llama; heads of 32, the least that vLLM's CPU attention takes."""
    return save_llama(tmp_path_factory.mktemp("models") / "untied", hidden=128)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "tied", hidden=128, tied=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums as prompts, examples and preferences in one file."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {
            "prompt": f"{a}+{b}=",
            "response": str(a + b),
            "answer": str(a + b),
            "chosen": str(a + b),
            "rejected": str(a + b + 1),
        }
        for a, b in SUMS
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def launch(cluster: None, model: Path, data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a recipe at a tiny size; overrides go last. Returns the run's summary."""

    def start(
        recipe: str, *overrides: str, eager: bool = False, local: bool = False, root: Path = tmp_path
    ) -> dict[str, Any]:
        settings = [
            "task=none",
            f"model.path={model}",
            "model.dtype=float32",
            f"data.train.path={data}",
            "data.prompts_per_step=4",
            "steps=2",
            f"output.root={root}",
            "resume=overwrite",
        ]
        made = compose_planned(recipe, [*settings, *overrides])
        made = local_launch(made, overrides) if local else made
        check_launch(made)
        with Display(made.run.name, made.run.steps, quiet=True) as display:
            return run(made, display, eager=eager or local, local=local)

    return start


@pytest.fixture(scope="session")
def warm(cluster: None) -> Iterator[WarmCluster]:
    made = WarmCluster()
    yield made
    made.end()


@pytest.fixture
def launch_warm(
    launch: Callable[..., dict[str, Any]], warm: WarmCluster, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """`launch`, in processes that are there already, without the roles that were in them. Not where the start or the
    end of processes is what is tested, or their logs in a run's own folder."""
    monkeypatch.setattr("controller.cluster.start.Cluster", lambda *settings: warm)
    return launch
