"""`rlhf-dist run RECIPE --eager` at a terminal: breakpoint() stops between two ops, and the data can be looked at."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.dataflow.trace import rehearsal, trace
from rlhf_dist.roles import Actor, Prompts, Reward
from tests.runs.terminal import Terminal

RECIPE = """
import numpy as np

from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reward


def length(prompt, response, answer):
    return float(len(response))


@recipe
def mine(prompts: Prompts, actor: Actor, reward: Reward) -> None:
    batch = actor.generate_sequences(prompts, n=2)
    print("BEFORE", len(batch.fetch("response")))
    batch = reward.compute_reward(batch)
    breakpoint()
    print("MEAN", f"{np.mean(batch.fetch('rewards')):.3f}")
"""


def test_a_recipe_is_debugged_line_by_line_at_a_terminal(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RECIPE)
    command = [str(Path(sys.executable).with_name("rlhf-dist")), "run", "mine.py", "--eager", "task=none"]
    command += [f"model.path={model}", f"data.train.path={data}", "data.prompts_per_step=2", "steps=3"]
    command += ["reward.function=length", "actor.rollout.engine=transformers", "actor.rollout.max_response_tokens=4"]
    terminal = Terminal(command, tmp_path)
    before = terminal.expect("(Pdb) ")
    assert before.count("BEFORE") == 1 and "BEFORE 4" in before, "tracing neither prints nor stops"
    assert "first step" in before and "\x1b[?25l" not in before, "phases as lines, and no table that hides the cursor"
    terminal.send('batch.fetch("rewards")')
    rewards = terminal.expect("(Pdb) ")
    assert len(re.findall(r"\d\.0", rewards)) == 4, rewards
    terminal.send("[len(row) for row in batch.fetch('response_ids')], batch.fetch('answer')")
    assert terminal.expect("(Pdb) ").count("'") >= 8, "columns that nobody reads any more are there until the step ends"
    terminal.send("c")
    assert re.search(r"MEAN \d\.\d\d\d\n", terminal.expect("step 1/3"))
    terminal.expect("BEFORE 4")
    terminal.expect("(Pdb) ")
    terminal.send("q")
    assert terminal.ended() == 130
    assert "interrupted" in terminal.said and "Traceback" not in terminal.said


@recipe
def looks(prompts: Prompts, actor: Actor, reward: Reward) -> None:
    batch = reward.compute_reward(actor.generate_sequences(prompts))
    breakpoint()
    print(max(batch.fetch("rewards")), batch.fetch("response")[0].upper(), batch.fetch("response_ids")[0].tolist())


def test_a_rehearsed_recipe_neither_stops_nor_prints_and_has_the_same_graph(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*args: object, **kwargs: object) -> None:
        raise AssertionError("it stopped")

    monkeypatch.setattr(sys, "breakpointhook", stops)
    with rehearsal():
        dataflow = trace(looks)
    assert [node.name for node in dataflow] == ["prompts", "actor.generate_sequences", "reward.compute_reward"]
    assert capsys.readouterr().out == "" and sys.breakpointhook is stops
    monkeypatch.setattr(sys, "breakpointhook", lambda: None)
    with pytest.raises(GraphError, match="fetching column 'rewards' needs the batch's data.*run with --eager"):
        trace(looks)
