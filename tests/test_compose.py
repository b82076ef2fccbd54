"""Settings: what composes, what a user's own file may do, and every message a mistake gets."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import cloudpickle
import pytest

from rlhf_dist import recipe_files
from rlhf_dist.compose import compose, compose_dataflow, list_recipes, load_recipe
from rlhf_dist.config import LanguageModelConfig, PoolConfig, RewardConfig, ValueModelConfig
from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.field_docs import field_docs
from rlhf_dist.recipe_files import family_of, list_families
from rlhf_dist.typed import ConfigError, build
from rlhf_dist.vocabulary_facts import recipe_facts
from tests.shelf import sources_of

MINE = '''"""A recipe of my own."""
from dataclasses import dataclass
from typing import Literal

from rlhf_dist.batch import Batch
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Critic, Prompts, Reward, RewardModel


@dataclass(frozen=True, kw_only=True)
class Mine:
    n: int = 2
    kind: Literal["a", "b"] = "a"
    scale: float | None = None


@dataclass(frozen=True)
class MyLoss:
    weight: float
    reads = ("rewards",)
    outputs = ("log_probs",)
    average = "tokens"

    def __call__(self, model, rows):
        return self.weight * model.log_probs, {}


class JudgeModel(RewardModel):
    """An interface of my own."""


def my_reward(prompt, response, answer):
    return float(len(response))


@recipe
def mine(prompts: Prompts, actor: Actor, reward: Reward, judge: JudgeModel, cfg: Mine):
    batch = actor.generate_sequences(prompts, n=cfg.n)
    batch = reward.compute_reward(batch)
    batch = judge.compute_reward(batch, out="judged")
    actor.update_actor(batch, loss=MyLoss(0.5))
'''


def write(folder: Path, text: str = MINE, name: str = "mine.py") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def message(spec: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        compose(spec, overrides)
    assert isinstance(caught.value, (ConfigError, GraphError))
    return str(caught.value)


# --- our recipes ---------------------------------------------------------------------------------------------
def test_every_recipe_composes_with_a_model_and_data() -> None:
    assert set(list_recipes()) >= {
        "sft", "reward_model", "dpo", "ppo", "grpo", "remax", "safe_rlhf", "iterative_dpo"
    }  # fmt: skip
    for name, file in list_recipes().items():
        launch = compose(name, ["model.path=/m", *sources_of(name)])
        assert launch.recipe.name == name and launch.run.name == name and launch.recipe.file == file
        assert family_of(file) in list_families() and recipe_facts(launch.recipe)["doc"]
        assert set(launch.roles) == set(launch.recipe.roles)


def test_one_of_ours_can_be_tried_as_it_is_and_a_copy_of_it_is_given_its_model_and_rows(tmp_path: Path) -> None:
    ours = compose("grpo").run.data.train
    assert ours.generator == "rlhf_dist.demo.addition:train" and compose("dpo").run.data.train.generator is None
    copy = write(tmp_path, list_recipes()["grpo"].read_text())
    assert message(copy).startswith("model.path has no value")
    assert compose(copy, ["model.path=/m"]).run.data.train.generator is None


def test_recipes_of_two_families_have_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("one", "other"):
        (tmp_path / family).mkdir()
        write(tmp_path / family, "", "same.py")
    write(tmp_path / "one", "", "_shared.py")
    monkeypatch.setattr(recipe_files, "recipes_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match="other/same.py and .*one/same.py have one name"):
        list_recipes()


def test_rows_of_the_source_follow_the_recipe() -> None:
    assert compose("dpo", ["model.path=/m"]).run.data.train.rows == "preferences"
    assert compose("sft", ["model.path=/m"]).run.data.train.rows == "examples"
    assert "must be preferences" in message("dpo", "model.path=/m", "data.train.rows=prompts")


def test_roles_follow_the_shared_model_unless_set_themselves() -> None:
    launch = compose("ppo", ["model.path=/m", "model.dtype=bfloat16", "critic.model.path=/c"])
    actor = launch.roles["actor"]
    assert isinstance(actor, LanguageModelConfig) and isinstance(launch.roles["critic"], ValueModelConfig)
    assert (actor.model.path, actor.engine.dtype, actor.rollout.dtype) == ("/m", "bfloat16", "bfloat16")
    assert launch.roles["critic"].model.path == "/c"
    assert "path: /c" in launch.yaml


def test_a_task_brings_data_and_reward_together() -> None:
    launch = compose("grpo", ["model=smollm2", "task=chain_sum"])
    reward = launch.roles["reward"]
    assert launch.run.data.train.generator == "chain_sum" and isinstance(reward, RewardConfig)
    assert reward.function == "rlhf_dist.rewards:reasoning_gym_solved"
    assert launch.roles["actor"].model.path == "models/smollm2"


def test_settings_are_frozen_and_typed_after_composition() -> None:
    launch = compose("ppo", ["model.path=/m", "actor.optimizer.betas=[0.8,0.9]", "placement.pools.gen.slots=3"])
    actor = launch.roles["actor"]
    assert isinstance(actor, LanguageModelConfig) and actor.optimizer.betas == (0.8, 0.9)
    assert launch.run.placement.pools["gen"] == PoolConfig(slots=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        actor.optimizer.lr = 1.0  # type: ignore[misc]


def test_optional_sections_and_removals_can_be_overridden() -> None:
    launch = compose("ppo", ["model.path=/m", "data.heldout=null", "reward.model.path=/r", "reward.function=null"])
    reward = launch.roles["reward"]
    assert launch.run.data.heldout is None and isinstance(reward, RewardConfig)
    assert reward.model is not None and reward.model.path == "/r"
    removed = compose("ppo", ["model.path=/m", "~placement.pools.main", "placement.pools.x.slots=1"])
    assert list(removed.run.placement.pools) == ["x"]


def test_composing_twice_gives_the_same_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    first = compose("ppo", ["model.path=/m", "steps=7"])
    compose("dpo", ["model.path=/m"])
    again = compose("ppo", ["model.path=/m", "steps=7"])
    assert first.yaml == again.yaml and first.roles == again.roles and list(tmp_path.iterdir()) == []


def test_a_graph_needs_no_model() -> None:
    assert compose_dataflow("ppo").name == "ppo"


# --- a user's own file -----------------------------------------------------------------------------------------
def test_a_recipe_file_anywhere_composes_without_yaml(tmp_path: Path) -> None:
    launch = compose(write(tmp_path), ["model=demo", "task=addition", "algorithm.n=4", "reward.function=my_reward"])
    assert launch.run.name == "mine" and launch.algorithm.n == 4
    assert isinstance(launch.roles["judge"], ValueModelConfig)  # by its nearest base
    assert launch.dataflow["actor.generate_sequences"].kwargs["n"] == 4


def test_a_yaml_beside_the_file_is_used_and_may_have_groups_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [schema, {model: none}, {task: none}, {placement: colocate}, _self_]\n"
        "name: special\nalgorithm: {n: 3}\n"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "local.yaml").write_text("path: /local\n")
    launch = compose(write(tmp_path), ["model=local"])
    assert (launch.run.name, launch.algorithm.n, launch.roles["actor"].model.path) == ("special", 3, "/local")


def test_one_of_several_recipes_is_named_after_a_colon(tmp_path: Path) -> None:
    second = MINE + MINE[MINE.index("@recipe") :].replace("def mine", "def other")
    spec = write(tmp_path, second)
    assert load_recipe(f"{spec}:other").name == "other"
    assert "2 recipes (mine, other)" in message(spec)
    assert "has no recipe third; it has mine, other" in message(f"{spec}:third")


def test_a_users_loss_travels_to_a_process_that_cannot_import_the_file(tmp_path: Path) -> None:
    launch = compose(write(tmp_path), ["model=demo"])
    loss = launch.dataflow["actor.update_actor"].kwargs["loss"]
    (tmp_path / "loss.bin").write_bytes(cloudpickle.dumps(loss))
    (tmp_path / "mine.py").unlink()
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'loss.bin')!r}, 'rb')).weight)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "0.5", done.stderr


def test_settings_can_be_pickled() -> None:
    roles = compose("ppo", ["model.path=/m"]).roles
    assert pickle.loads(pickle.dumps(roles)) == roles


# --- mistakes ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("actor.optimzer.lr=1", "did you mean actor.optimizer.lr?"),
        ("lr=1e-5", "did you mean actor.optimizer.lr?"),
        ("placement.pools.main.slot=2", "did you mean placement.pools.main.slots?"),
        ("model=qwen", "model=qwen does not exist; there is demo, none, smollm2"),
        ("task=chainsum", "task=chainsum does not exist; there is addition"),
        ("actor.optimizer.lr=fast", "actor.optimizer.lr must be a number, got 'fast'"),
        ("steps=1.5", "steps must be a whole number, got 1.5"),
        ("data.train.shuffle=3", "data.train.shuffle must be true or false, got 3"),
        ("actor.optimizer=3", "actor.optimizer is a section"),
        ("actor.optimizer.betas=[0.1]", "actor.optimizer.betas must have 2 entries, got 1"),
        ("resume=sometimes", "resume must be one of never, auto, overwrite, step_N, got 'sometimes'"),
        ("actor.engine.name=megatron", "actor.engine.name must be one of fsdp, deepspeed, got 'megatron'"),
        ("actor.rollout.dtype=float16", "actor.rollout.dtype must be one of auto, float32, bfloat16, got 'float16'"),
        ("actor.model.init=zeros", "actor.model.init must be one of pretrained, random, got 'zeros'"),
        ("actor.optimizer.schedule=step", "must be one of constant, linear, cosine, got 'step'"),
        ("placement.pools.main.device=tpu", "must be one of auto, cuda, cpu, got 'tpu'"),
        ("steps=${nowhere.path}", "steps: Interpolation key 'nowhere.path' not found"),
        ("reward.model={}", "reward.model.path has no value and needs one"),
        ("seed=1,2", "is a sweep"),
        ("steps", "cannot read the override 'steps'"),
    ],
)
def test_a_mistaken_override_is_named_with_the_way_out(override: str, expected: str) -> None:
    text = message("ppo", "model.path=/m", override)
    assert expected in text and "\n" not in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train.mix={a: a.jsonl}", "data.train.mix.a is a section with path, .* got 'a.jsonl'"),
        ("data.sources=x", "data.sources must be a mapping, got 'x'"),
        ("data.train=a.jsonl", "data.train is a section with path, .* got 'a.jsonl'"),
    ],
)
def test_a_text_in_place_of_a_section_of_rows_is_named(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{expected}"):
        compose("sft", [override, "task=none", "name=x", "model.path=m"])


def test_a_missing_model_is_named_with_the_choices() -> None:
    assert message("ppo", "model=none") == (
        "model.path has no value and needs one; set model.path=FOLDER, or choose model=demo, model=smollm2"
    )


def test_a_model_for_every_role_makes_the_shared_one_unnecessary() -> None:
    each = [f"{role}.model.path=/m" for role in ("actor", "critic", "reference")]
    assert compose("ppo", ["model=none", *each]).roles["actor"].model.path == "/m"


def test_unknown_recipes_name_the_nearest_and_how_to_find_others() -> None:
    text = message("gpro")
    assert "did you mean grpo?" in text and "`rlhf-dist recipes --search TEXT`" in text and "path/to/mine.py" in text


def test_mistakes_in_a_users_file_name_file_and_line(tmp_path: Path) -> None:
    assert "does not exist" in message(str(tmp_path / "none.py"))
    assert "no function marked @recipe" in message(write(tmp_path, "x = 1\n", "empty.py"))
    assert "syntax.py:2:" in message(write(tmp_path, "x = 1\ndef (:\n", "syntax.py"))
    assert "broken.py:3: ZeroDivisionError" in message(write(tmp_path, "x = 1\n\ny = 1 / 0\n", "broken.py"))
    untyped = MINE.replace("actor: Actor", "actor")
    assert "parameter 'actor' must be annotated" in message(write(tmp_path, untyped, "untyped.py"))
    assert "kind must be one of a, b, got 'c'" in message(write(tmp_path), "model=demo", "algorithm.kind=c")


def test_a_mistake_in_a_users_yaml_is_named(tmp_path: Path) -> None:
    defaults = "defaults: [schema, {model: demo}, {task: none}, {placement: colocate}, _self_]\nname: x\n"
    (tmp_path / "mine.yaml").write_text(defaults + "actor: {optimiser: {lr: 1}}\n")
    assert "did you mean actor.optimizer?" in message(write(tmp_path))
    (tmp_path / "mine.yaml").write_text("defaults: [schema, {model: nothing}]\nname: x\n")
    assert "model/nothing" in message(write(tmp_path))


def test_a_role_may_not_take_the_name_of_a_section(tmp_path: Path) -> None:
    assert "a role cannot be called 'data'" in message(write(tmp_path, MINE.replace("judge", "data"), "clash.py"))


# --- typed -------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    word: Literal["x", "y"]
    """A word."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    numbers: tuple[int, ...] = ()
    """Some numbers."""
    table: dict[str, Inner] = dataclasses.field(default_factory=dict)
    either: int | str | None = None

    def __post_init__(self) -> None:
        if len(self.numbers) > 2:
            raise ValueError("at most two numbers")


def test_build_restores_tuples_tables_and_unions() -> None:
    built = build(Outer, {"numbers": [1, 2.0], "table": {"a": {"word": "x"}}, "either": "7"})
    assert built == Outer(numbers=(1, 2), table={"a": Inner(word="x")}, either="7")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"table": {"a": {}}}, "table.a.word has no value"),
        ({"table": {"a": {"word": "z"}}}, "table.a.word must be one of x, y, got 'z'"),
        ({"numbers": [True]}, "numbers[0] must be a whole number, got True"),
        ({"numbers": [1, 2, 3]}, "at most two numbers"),
        ({"numbers": [float("nan")]}, "numbers[0] must be a whole number, got nan"),
    ],
)
def test_build_names_the_key(data: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected.replace("[", r"\[").replace("]", r"\]")):
        build(Outer, data)


def test_the_line_under_a_field_is_its_documentation() -> None:
    assert field_docs(Outer)["numbers"] == "Some numbers."
    assert "per optimizer step" in field_docs(LanguageModelConfig)["optimizer.lr"]
