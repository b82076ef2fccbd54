"""The guide to recipes is a recipe: its blocks are put together, checked by the command line, and its parts called."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from controller.commands.cli import main
from rlhf_dist.algorithms.contract import Loss
from rlhf_dist.batch import Batch, Column
from rlhf_dist.compose import compose, compose_dataflow
from rlhf_dist.python_files import load_file
from rlhf_dist.role_kinds import kind_of
from rlhf_dist.testing import check_loss, check_recipe
from rlhf_dist.transforms import __all__ as host_ops
from tests.tiny import save_llama

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text("\n\n".join(blocks("writing-a-recipe.md", "python")))
    (tmp_path / "mine.yaml").write_text(blocks("writing-a-recipe.md", "yaml")[0])
    return tmp_path / "mine.py"


def test_the_guides_recipe_is_checked_as_it_says(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_llama(tmp_path / "model")
    assert main(["check", str(mine), f"model.path={model}", f"output.root={tmp_path}"]) == 0, capsys.readouterr().err
    plan = capsys.readouterr().out
    assert "4 prompts -> 16 rows" in plan and "less_for_length" in plan
    node = compose_dataflow(str(mine))["less_for_length"]
    assert node.kwargs == {"longest": 8, "slack": 4}, "the limit follows actor.rollout.max_response_tokens"
    assert [entry.rows for entry in node.inputs] == ["actor.generate_sequences"]


def test_the_guides_kind_of_role_is_one(mine: Path) -> None:
    module = load_file(mine)
    assert kind_of(module.Counter).base.__name__ == "Function"
    batch = Batch({"response": Column.strings(["77", "1"])}, 2)
    counted = module.CounterWorker(None, module.CounterConfig()).count(batch, None, scale=2.0)
    assert counted["counts"].values.tolist() == [4.0, 0.0]


def test_the_guides_op_loss_and_reward_do_what_they_say(mine: Path) -> None:
    module = load_file(mine)
    lengths = np.array([4, 6, 8])
    mask = Column(np.ones(18, dtype=np.uint8), np.concatenate([[0], lengths.cumsum()]))
    batch = Batch({"rewards": Column(np.ones(3, dtype=np.float32)), "response_mask": mask})
    result = module.less_for_length(batch, longest=8, slack=4)
    np.testing.assert_allclose(result.columns["rewards"].values, [1.0, 0.5, 0.0])
    loss = module.entropic(bonus=0.5)
    assert isinstance(loss, Loss)
    said = SimpleNamespace(log_probs=torch.tensor([-2.0]), entropy=torch.tensor([1.0]))
    value, metrics = loss(said, {"advantages": torch.tensor([3.0])})
    assert value.item() == 5.5 and metrics["policy_loss"].item() == 5.5
    assert module.digits("", "1a2b", "") == 0.5
    check_loss(module.generative_reward(), heads=module.Generative.heads)
    check_loss(module.spread_out())


def test_settings_in_the_page_on_running_compose(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(blocks("running.md", "yaml")[0])
    launch = compose("grpo", ["data.train.system=What's (A), $5?"], str(tmp_path / "mine.yaml"))
    assert launch.run.data.train.system == "What's (A), $5?" and launch.run.data.train.generator == "chain_sum"


def test_the_list_of_ops_has_all_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ops"]) == 0
    listed = {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert {*host_ops, "Actor.update_actor", "ppo_clip", "value_clip"} <= listed
    assert "rewards, values, response_mask -> advantages, returns, response_mask" in listed


# --- from PPO to other methods ---------------------------------------------------------------------------------------
def changed(text: str, diff: str) -> str:
    """`text` with the hunks of `diff`, parted by @@: lines that stay or go must be there, once."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def ppo_of_the_guide() -> str:
    (base,) = blocks("writing-a-recipe.md", "py base")
    return base


DIFFS = blocks("writing-a-recipe.md", "diff")


@pytest.mark.parametrize("diff", DIFFS, ids=range(len(DIFFS)))
def test_a_short_change_of_ppo_is_another_method_that_runs(diff: str, tmp_path: Path) -> None:
    assert sum(line[0] in "+-" for line in diff.splitlines()) <= 15
    file = tmp_path / "mine.py"
    file.write_text(changed(ppo_of_the_guide(), diff))
    (step,) = check_recipe(file, steps=1, **{"data.prompts_per_step": 2})
    assert step["actor/grad_norm"] > 0
