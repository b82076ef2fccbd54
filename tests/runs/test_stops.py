"""A run that is stopped keeps the checkpoint it was writing, and goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from controller.lifecycle.checkpoint import list_checkpoints
from controller.lifecycle.run import run
from controller.record.display import Display
from controller.record.metrics import read_metrics
from rlhf_dist.compose import compose


class Stopping(Display):
    """Stops the run when step 2 is shown: by then the checkpoint after 2 steps has begun and is not yet looked at."""

    def step(self, step: int, metrics: Mapping[str, float], node_seconds: Mapping[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt


def test_a_stopped_run_keeps_its_pending_checkpoint_and_continues(
    cluster: None, launch: Callable[..., dict[str, Any]], model: Path, data: Path, tmp_path: Path
) -> None:
    settings = [
        "task=none",
        f"model.path={model}",
        "model.dtype=float32",
        f"data.train.path={data}",
        f"output.root={tmp_path}",
    ]
    stopped = compose("sft", [*settings, "data.prompts_per_step=4", "steps=100", "output.checkpoint_every=2"])
    with pytest.raises(KeyboardInterrupt), Stopping("sft", 100, quiet=True) as display:
        run(stopped, display)
    folder = tmp_path / "sft"
    assert [one.step for one in list_checkpoints(folder / "checkpoints")] == [2]
    assert not list((folder / "checkpoints").glob("*.partial"))
    launch("sft", "resume=auto", "steps=4", "output.checkpoint_every=null")
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 2, 3]
    assert [one.step for one in list_checkpoints(folder / "checkpoints")] == [2], "null writes none"
    assert (folder / "models/actor/config.json").is_file()
