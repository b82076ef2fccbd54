"""Out of memory in a micro-batch: once, the role goes on with half of its tokens at a time; then the run ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.execution.failed_calls import NodeError
from tests.runs.test_recipes import weights

RECIPE = """
import torch

from rlhf_dist.algorithms import loss
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Examples


@loss(reads=("response_mask",), average="tokens")
def hungry(model, rows, most: int = 0):
    if len(model.log_probs) > most:
        torch.empty(1 << 50)
    return -model.log_probs, {}


@recipe
def mine(examples: Examples, actor: Actor) -> None:
    actor.update_actor(examples, loss=hungry(MOST))
"""


@pytest.mark.parametrize("most", [9, 1])
def test_a_role_that_runs_out_of_memory_takes_half_once(launch: Callable[..., Any], tmp_path: Path, most: int) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE.replace("MOST", str(most)))
    settings = (str(file), "actor.optimizer.lr=1e-3", "steps=3", "data.prompts_per_step=8")
    if most == 1:
        with pytest.raises(NodeError, match=r"can't allocate memory.*; actor takes 16 tokens .* already") as caught:
            launch(*settings, "actor.engine.micro_batch_tokens=32", local=True)
        assert caught.value.kind == "out of memory"
        return
    summary = launch(*settings, "actor.engine.micro_batch_tokens=32", local=True, root=tmp_path / "halved")
    (one,) = summary["recoveries"]
    assert (one["back_to"], one["from"]) == (0, "start") and "can't allocate memory" in one["what"]
    launch(*settings, "actor.engine.micro_batch_tokens=16", local=True, root=tmp_path / "half")
    found, expected = (weights(tmp_path / name / "mine/models/actor") for name in ("halved", "half"))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
