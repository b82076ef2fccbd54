"""A user's file is one module however it is named, and what it defines reaches processes that cannot import it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ray import cloudpickle

from controller.cluster.user_files import send_user_files_by_value
from rlhf_dist.python_files import load_file
from rlhf_dist.recipe_files import load_recipe
from rlhf_dist.rewards import load_function

SOURCE = """
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reward, State, state_op

with Path(__file__).with_suffix(".count").open("a") as count:
    count.write("executed ")


@dataclass(frozen=True, kw_only=True)
class Mine:
    scale: float = 3.0


@dataclass(frozen=True)
class Scaled:
    scale: float
    reads = ("advantages",)
    outputs = ("log_probs",)
    average = "tokens"

    def __call__(self, model, rows):
        return self.scale * model, {}


class Counter(State):
    def initial(self, cfg: Mine) -> dict[str, float]:
        return {"count": cfg.scale}

    @state_op(reads=("rewards",))
    def update(self, numbers, batch):
        return {"count": numbers["count"] + 1}, {}


def plus(value: float) -> float:
    return value + 1.0


@host_op(reads=("rewards",), writes=("advantages",))
def raised(batch: Batch) -> Batch:
    return Batch({"advantages": Column(np.float32(plus(batch["rewards"].values)))})


def length(prompt: str, response: str, answer: str) -> float:
    return plus(len(response))


@recipe
def mine(prompts: Prompts, actor: Actor, reward: Reward, counter: Counter, cfg: Mine) -> None:
    batch = reward.compute_reward(actor.generate_sequences(prompts))
    counter.update(batch)
    actor.update_actor(raised(batch), loss=Scaled(cfg.scale))
"""

RECEIVER = """
import pickle, sys
loss, op, reward, state, cfg = pickle.loads(sys.stdin.buffer.read())
from rlhf_dist.batch import Batch
assert loss(2.0, None)[0] == 2.0 * cfg.scale == 6.0
assert op.function(Batch.of(rewards=[1.0])).row(0)["advantages"] == 2.0
assert reward("", "four", "") == 5.0
assert state.update(state.initial(cfg), None)[0] == {"count": 4.0}
print("received")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_recipe_reward_and_generator_of_one_file_share_one_module(file: Path) -> None:
    recipe = load_recipe(str(file))
    by_name, by_path = load_function("length", recipe.file), load_function(f"{file}:length")
    assert by_name is by_path
    assert by_name.__module__ == recipe.function.__module__ == recipe.config.__module__
    assert file.with_suffix(".count").read_text() == "executed "


def test_a_file_that_raises_is_not_kept_and_can_be_repaired(file: Path) -> None:
    file.write_text("import numpy\nraise RuntimeError('half done')\n")
    with pytest.raises(RuntimeError, match="half done"):
        load_file(file)
    assert not any(
        name.startswith("mine_") and getattr(m, "__file__", "") == str(file) for name, m in sys.modules.items()
    )
    file.write_text("VALUE = 7\n")
    assert load_file(file).VALUE == 7


@pytest.mark.parametrize("loaded_first", [True, False])
def test_what_a_file_defines_travels_in_rays_messages(file: Path, loaded_first: bool) -> None:
    # Ray's cloudpickle is a copy with a registry of its own, so the original's does not help.
    if loaded_first:
        load_file(file)
    send_user_files_by_value()
    module = load_file(file)
    cfg = module.Mine()
    message = cloudpickle.dumps((module.Scaled(cfg.scale), module.raised, module.length, module.Counter(), cfg))
    file.unlink()
    received = subprocess.run([sys.executable, "-c", RECEIVER], input=message, capture_output=True, timeout=60)
    assert received.stdout.decode().strip() == "received", received.stderr.decode()


SIBLING = "FACTOR = 2.0\n\n\ndef twice(text):\n    return FACTOR * len(text)\n"
IMPORTS = """
from {package} import twice

def length(prompt, response, answer):
    return twice(response)

def late(prompt, response, answer):
    import {package}_late
    return {package}_late.VALUE
"""


def test_a_file_may_import_what_lies_beside_it_and_it_travels_too(tmp_path: Path) -> None:
    (tmp_path / "shared_by_value.py").write_text(SIBLING)
    (tmp_path / "imports.py").write_text(IMPORTS.format(package="shared_by_value"))
    send_user_files_by_value()
    message = cloudpickle.dumps((load_function(f"{tmp_path / 'imports.py'}:length"),))
    (tmp_path / "shared_by_value.py").unlink()
    receiver = (
        "import pickle, sys; f, = pickle.loads(sys.stdin.buffer.read()); assert f('', 'four', '') == 8; print('ok')"
    )
    received = subprocess.run([sys.executable, "-c", receiver], input=message, capture_output=True, timeout=60)
    assert received.stdout.decode().strip() == "ok", received.stderr.decode()


def test_what_a_reward_imports_when_it_is_called_is_found_beside_it(tmp_path: Path) -> None:
    from rlhf_dist.rewards.child import Limits
    from rlhf_dist.rewards.load import load_reward
    from rlhf_dist.rewards.process import ScoringProcess

    (tmp_path / "shared_at_call.py").write_text(SIBLING)
    (tmp_path / "shared_at_call_late.py").write_text("VALUE = 5.0\n")
    (tmp_path / "calls.py").write_text(IMPORTS.format(package="shared_at_call"))
    process = ScoringProcess(load_reward(f"{tmp_path / 'calls.py'}:late"), Limits())
    try:
        rows = {name: ["a"] for name in ("prompt", "response", "answer")}
        assert process.score(rows, 1) == [{"reward": 5.0}]
    finally:
        process.close()


def test_a_changed_file_or_sibling_is_executed_again(tmp_path: Path) -> None:
    sibling, file = tmp_path / "shared_changes.py", tmp_path / "changes.py"
    sibling.write_text(SIBLING)
    file.write_text(IMPORTS.format(package="shared_changes"))
    first = load_function(f"{file}:length")
    assert load_function(f"{file}:length") is first and first("", "four", "") == 8.0
    sibling.write_text(SIBLING.replace("2.0", "30.0"))
    assert load_function(f"{file}:length")("", "four", "") == 120.0
    file.write_text(IMPORTS.format(package="shared_changes").replace("twice(response)", "0.5"))
    assert load_function(f"{file}:length")("", "four", "") == 0.5


def test_two_folders_cannot_have_a_module_of_one_name(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "shared_twice.py").write_text(SIBLING)
        (tmp_path / folder / f"user_{folder}.py").write_text(IMPORTS.format(package="shared_twice"))
    load_file(tmp_path / "one" / "user_one.py")
    with pytest.raises(ValueError, match="two/shared_twice.py and the module 'shared_twice' in .*/one have one name"):
        load_file(tmp_path / "two" / "user_two.py")
    (tmp_path / "three" / "workers").mkdir(parents=True)
    (tmp_path / "three" / "workers" / "__init__.py").write_text("")
    (tmp_path / "three" / "mine.py").write_text("")
    with pytest.raises(ValueError, match="the module 'workers' in .* have one name"):
        load_file(tmp_path / "three" / "mine.py")
