"""Runs of a second or two in this process, for tests of what a run leaves and goes on from."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

from controller.cluster.local import local_launch
from controller.lifecycle.run import run
from controller.record.display import Display
from rlhf_dist.compose import Launch, compose
from tests.tiny import save_llama


def settings(root: Path, *overrides: str) -> list[str]:
    base = [
        f"model.path={root / 'model'}",
        "model.dtype=float32",
        "task=none",
        f"data.train.path={root / 'data.jsonl'}",
    ]
    base += ["data.prompts_per_step=2", "name=x", f"output.root={root / 'runs'}", "output.checkpoint_every=2"]
    return [*base, "output.rollouts_every=0", *overrides]


@cache
def _composed(model: Path, *overrides: str) -> Launch:
    given = settings(model.parent, *overrides)
    return local_launch(compose("sft", given), given)


def launched(root: Path, *overrides: str) -> Launch:
    launch = _composed((root / "model").resolve(), *overrides)
    output = replace(launch.run.output, root=str(root / "runs"))
    return replace(launch, run=replace(launch.run, output=output))


def run_local(launch: Launch) -> None:
    with Display("x", launch.run.steps, quiet=True) as display:
        run(launch, display, eager=True, local=True)


def run_four_steps(root: Path) -> None:
    """SFT, four steps of two of sixteen rows; checkpoints after two and four in root/runs/x."""
    save_llama(root / "model")
    rows = [{"prompt": f"{n}+1=", "response": str(n + 1)} for n in range(16)]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_local(launched(root, "steps=4"))
