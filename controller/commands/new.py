"""`rlhf-dist new recipe NAME` and `rlhf-dist new model FOLDER`: files to start from, written once and then the user's.

NAME.py        a recipe that runs: settings, a reward, an advantage, a loss
NAME.yaml      its settings, read by itself
test_NAME.py   its test, with rlhf_dist.testing
"""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import re
from pathlib import Path

from controller.commands.registry import Commands
from rlhf_dist.python_files import OURS
from rlhf_dist.typed import ConfigError

MODEL = "tiny"
"""Folder that the written settings name as the model."""

RECIPE = '''"""NAME: say in this line what it is, and cite its paper."""

from dataclasses import dataclass

from rlhf_dist.algorithms import loss
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reward


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Set on the command line as algorithm.samples_per_prompt=8; the line under a field is its help."""

    samples_per_prompt: int = 4
    """Responses to each prompt."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""


def share_of_digits(prompt: str, response: str, answer: str) -> float:
    """The reward; NAME.yaml names it. Change what is good here, or set reward.function to another."""
    return sum(character.isdigit() for character in response) / max(len(response), 1)


@host_op(reads=("rewards", "group_id", "response_mask"), writes=("advantages",), scope="groups")
def advantage(batch: Batch) -> Batch:
    """Each reward less the mean of its prompt's, the same for all tokens. Change the baseline here.

    `reads` and `writes` are checked before a run; scope="groups" brings all responses to a prompt at once.
    `rlhf-dist columns` lists columns.
    """
    rewards, mask = batch["rewards"].values.astype("float32"), batch["response_mask"]
    centred = rewards.copy()
    for rows in batch.group():
        centred[rows] -= rewards[rows].mean()
    return Batch({"advantages": Column(centred.repeat(mask.lengths), mask.offsets)})


@loss(reads=("advantages", "old_log_probs"), outputs=("log_probs",), average="tokens")
def clipped(model, rows, clip: float = 0.2):
    """PPO's clipped loss. Change the objective here: one number per token, masked and averaged by the engine.

    `reads` may name any column of the batch, `outputs` log_probs and entropy of a policy.
    """
    ratio = (model.log_probs - rows["old_log_probs"]).exp()
    gain, cut = ratio * rows["advantages"], ratio.clamp(1 - clip, 1 + clip) * rows["advantages"]
    return -gain.minimum(cut), {"ratio": ratio.detach()}


@recipe
def NAME(prompts: Prompts, actor: Actor, reward: Reward, cfg: Settings) -> None:
    """The parameters are the roles: `rlhf-dist roles` lists kinds. Add `reference: Reference` for a KL term."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = reward.compute_reward(batch)
    batch = actor.compute_log_prob(batch)
    batch = advantage(batch)
    actor.update_actor(batch, loss=clipped(cfg.clip))
'''

SETTINGS = """# Settings of NAME.py; the command line goes last. `rlhf-dist config NAME.py` lists all.
task: addition                        # rows; or none, and data.train.path
model: {path: MODEL}                   # `rlhf-dist new model MODEL` writes a random one to try
reward: {function: share_of_digits}
actor:
  rollout: {max_response_tokens: 8}
  optimizer: {lr: 1e-4}
data.prompts_per_step: 8
steps: 20
output.root: runs
"""

TEST = '''"""NAME.py, tried at the smallest size: no GPU, no Ray, seconds. Run with `pytest test_NAME.py`."""

from pathlib import Path

from NAME import clipped

from rlhf_dist.testing import check_loss, check_recipe


def test_the_recipe_runs_the_same_line_by_line_and_as_a_graph() -> None:
    steps = check_recipe(Path(__file__).with_name("NAME.py"))
    assert 0 <= steps[-1]["reward/reward"] <= 1


def test_the_loss_does_not_depend_on_micro_batches() -> None:
    check_loss(clipped(clip=0.2))
'''


def register(commands: Commands) -> None:
    """`new`."""
    new = commands.add(
        "new", new_command, "write files to start from: a recipe, a tiny model",
        "new recipe my_grpo", "new model models/tiny",
    )  # fmt: skip
    kinds = new.add_subparsers(dest="what", required=True, metavar="WHAT")
    recipe = kinds.add_parser("recipe", parents=[commands.common], help="a recipe that runs, its settings and its test")
    recipe.add_argument("name", metavar="NAME", help="its name, e.g. my_grpo: writes my_grpo.py, .yaml and a test")
    recipe.add_argument("--folder", default=".", metavar="FOLDER", help="where to write; default: here")
    model = kinds.add_parser("model", parents=[commands.common], help="a tiny random model, to try recipes with")
    model.add_argument("folder", metavar="FOLDER", help="the folder to write; it must not be there yet")


def new_command(arguments: argparse.Namespace) -> int:
    """Write what is asked for. Raises ConfigError for a name that cannot be, or files that are there already."""
    if arguments.what == "model":
        _write_model(Path(arguments.folder))
        return 0
    folder, name = Path(arguments.folder), arguments.name
    _check_name(name)
    files = {f"{name}.py": RECIPE, f"{name}.yaml": SETTINGS, f"test_{name}.py": TEST}
    there = [str(folder / file) for file in files if (folder / file).exists()]
    if there:
        raise ConfigError(f"{there[0]} exists already and is left as it is; choose another name or --folder")
    if name in OURS or importlib.util.find_spec(name) is not None:
        raise ConfigError(f"there is a Python module {name} already, which imports would find; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file).write_text(text.replace("NAME", name).replace("MODEL", MODEL))
    path, test = folder / f"{name}.py", folder / f"test_{name}.py"
    print(f"wrote {path}, {path.with_suffix('.yaml')} and {test}; next:")
    print(f"  pytest {test}\n  rlhf-dist new model {MODEL}\n  rlhf-dist run {path} --local")
    return 0


def _check_name(name: str) -> None:
    from rlhf_dist.recipe_files import list_recipes

    if not re.fullmatch("[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name.startswith("test_"):
        raise ConfigError(
            f"a recipe's name is a Python name in small letters, such as my_grpo, that is no keyword and does not "
            f"begin with test_; got {name!r}"
        )
    if name in list_recipes():
        raise ConfigError(f"{name} is one of our recipes; choose another name, such as my_{name}")


def _write_model(folder: Path) -> None:
    if folder.exists():
        raise ConfigError(f"{folder} exists already and is left as it is; name a new folder")
    from rlhf_dist.testing.tiny_model import save_llama

    save_llama(folder)
    print(f"wrote {folder}: a random Llama, one token a character; rlhf-dist run RECIPE --local model.path={folder}")
