"""`launch` from Python: in a script, under a running event loop, interrupted, again, and with mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from controller import RunResult, launch
from controller.lifecycle.api import _override
from rlhf_dist.compose import compose
from rlhf_dist.typed import ConfigError

SCRIPT = """
import asyncio, json, os, signal, sys, threading, time
from pathlib import Path

from controller import launch

model, data, root = sys.argv[1:]
SETTINGS = {
    "task": "none", "model.path": model, "data.train.path": data, "data.prompts_per_step": 4, "output.root": Path(root),
    "actor.rollout.engine": "transformers", "actor.rollout.max_response_tokens": 4, "algorithm.kl_coef": 0,
    "placement.pools.main.slots": 1, "ray.object_store_bytes": 128 << 20,
}

def my_reward(prompt, response, answer):
    return float(len(response))

def interrupt(metrics):
    while not metrics.is_file() or not metrics.read_text():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

async def in_a_notebook():
    threading.Thread(target=interrupt, args=[Path(root) / "long" / "metrics.jsonl"], daemon=True).start()
    try:
        launch("grpo", "name=long", "steps=10000", settings={**SETTINGS, "reward.function": my_reward}, quiet=True)
    except KeyboardInterrupt:
        print("interrupted")
    result = launch("grpo", "steps=2", settings={**SETTINGS, "reward.function": my_reward}, quiet=True)
    print(json.dumps({
        "folder": str(result.folder), "steps": len(result.metrics), "last": result.summary["last"]["reward/reward"],
        "metric": result.metrics[-1]["reward/reward"], "models": {k: str(v) for k, v in result.models.items()},
    }))
    try:
        launch("grpo", settings={**SETTINGS, "reward.function": my_reward}, quiet=True)
    except ValueError as error:
        print(type(error).__name__, error)

if __name__ == "__main__":
    asyncio.run(in_a_notebook())
"""


def test_a_script_under_a_running_event_loop_launches_is_interrupted_and_launches_again(
    model: Path, data: Path, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = tmp_path / "runs"
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(data), str(root)],
        capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    interrupted, result, refused = [line for line in done.stdout.splitlines() if line]
    assert interrupted == "interrupted"
    found = json.loads(result)
    assert found["steps"] == 2 and found["last"] == found["metric"] and found["folder"] == str(root / "grpo")
    assert found["models"] == {"actor": str(root / "grpo" / "models" / "actor")}
    assert refused.startswith("ConfigError") and "holds an earlier run" in refused


def test_a_mistake_is_raised_before_anything_starts(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean actor.optimizer.lr"):
        launch("grpo", settings={"model.path": model, "actor.lr": 1e-5})
    with pytest.raises(ConfigError, match="no recipe|did you mean|recipe"):
        launch("grpoo")
    with pytest.raises(ConfigError, match="reward.function: .*<lambda>. has no name of its own"):
        launch("grpo", settings={"reward.function": lambda response: 0.0})


def test_settings_are_python_values(tmp_path: Path) -> None:
    assert _override("a", None) == "a=null" and _override("a", True) == "a=true" and _override("a", 1e-5) == "a=1e-05"
    assert _override("a", {"b": [1, "it's"], "c": None}) == "a={b: [1,'it\\'s'],c: null}"
    for text in (r"it's \d+", "ends so \\", r"\\'\n"):
        made = compose("grpo", [_override("data.train.generator_args", {"x": text})])
        assert made.run.data.train.generator_args == {"x": text}
    assert _override("a", Path("/x y")) == "a=/x y"
    assert _override("reward.function", RunResult) == "reward.function=controller.lifecycle.api:RunResult"
    with pytest.raises(ConfigError, match="a is given as a set"):
        _override("a", {1})
