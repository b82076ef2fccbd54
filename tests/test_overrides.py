"""What is typed is what the run reads: text as it stands, paths expanded, settings files that run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf_dist import typed
from rlhf_dist.compose import Launch, compose, compose_dataflow, load_recipe, root_type
from rlhf_dist.config import LanguageModelConfig, PathText
from rlhf_dist.roles import LanguageModel, ValueModel, base_of
from rlhf_dist.typed import ConfigError
from tests.shelf import of_each_shape, sources_of

BASE = ["model.path=/m", "actor.engine.lora.rank=4", "data.heldout.size=3"]


def text_keys() -> list[str]:
    """Every key of ppo whose type is plain text, of any words."""
    found = []
    for key, kind in typed.keys(root_type(load_recipe("ppo"))).items():
        parts = {part for part in (kind, *typed.typing.get_args(kind)) if part is not type(None)}
        words = key != "name" and any(key.rpartition(".")[2] == name for _, name in typed.ALLOWED)
        path = key.endswith(".path")  # where ~ and $NAME stand for something
        if str in parts and typed.is_text(kind, "") and not words and not path:
            found.append(key)
    return found


def read(launch: Launch, key: str) -> Any:
    """What the run's dataclasses hold under a dotted key."""
    first, *rest = key.split(".")
    value: Any = launch.roles.get(first, getattr(launch.run, first, None))
    for name in rest:
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


def kept(launch: Launch, key: str) -> Any:
    """What config.yaml holds."""
    value: Any = yaml.safe_load(launch.yaml)
    for name in key.split("."):
        value = value[name]
    return value


def failure(*overrides: str, recipe: str = "ppo", config: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(recipe, overrides, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- text --------------------------------------------------------------------------------------------------------
KEYS = [key for key in text_keys() if key.split(".")[0] in ("actor", "data", "name", "reward", "placement", "ray")]
SPECIAL = st.text(st.sampled_from("${}\\\\'\"=,:()[]~# \n\t.a5"), max_size=12)
PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp")), max_size=40)


def test_there_are_text_keys_of_every_kind() -> None:
    assert {"name", "data.train.system", "reward.function", "actor.engine.lora.targets"} <= set(KEYS)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), SPECIAL | PRINTABLE, min_size=3, max_size=8))
@example({"data.train.system": "Answer with (A), (B) or (C)."})
@example({"data.train.system": "What's the answer?", "name": "costs $5", "reward.function": "${x"})
@example({"actor.engine.lora.targets": ".*(q|v)_proj", "data.train.system": "你是助手。", "name": "007"})
@example({"data.train.system": r"\\${model.path}\ ", "name": "1e-5", "data.train.prompt_key": "null and void"})
def test_what_is_typed_is_what_the_config_holds_and_the_run_reads(typed_in: dict[str, str]) -> None:
    # `null` where a key may be without a value, and the mark of a missing one, are no texts.
    typed_in = {key: text for key, text in typed_in.items() if text not in ("null", "???")}
    launch = compose("ppo", [*BASE, *(f"{key}={text}" for key, text in typed_in.items())])
    for key, text in typed_in.items():
        assert kept(launch, key) == text and read(launch, key) == text


@settings(max_examples=15, deadline=None)
@given(text=SPECIAL | PRINTABLE)
def test_a_text_that_others_follow_reaches_them_as_it_stands(text: str) -> None:
    if text in ("null", "???"):
        return
    launch = compose("ppo", [*BASE, f"task.reward={text}"])
    assert read(launch, "reward.function") == text and kept(launch, "reward.function") == text


def test_null_takes_an_optional_text_away_and_other_words_are_words() -> None:
    launch = compose("ppo", ["model.path=/m", "data.train.system=null", "name=null", "placement.roles.actor=007"])
    assert launch.run.data.train.system is None and launch.run.name == "null"
    assert launch.run.placement.roles["actor"] == "007"


def test_structured_keys_keep_the_grammar() -> None:
    launch = compose("ppo", ["model.path=/m", "steps=${seed}", "seed=7", "data.train.generator_args={a: [1, 'x,y']}"])
    assert launch.run.steps == 7 and launch.run.data.train.generator_args == {"a": [1, "x,y"]}


def test_a_setting_that_is_text_or_a_list_is_a_list_in_brackets() -> None:
    assert typed.is_text(str | list[str] | None, "a, b") and not typed.is_text(str | list[str] | None, "[a, b]")
    assert not typed.is_text(int | str, "7") and not typed.is_text(dict[str, str], "x")


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_plus_in_front_changes_nothing(prefix: str) -> None:
    assert compose("ppo", ["model.path=/m", f"{prefix}name=a=b"]).run.name == "a=b"


# --- paths -------------------------------------------------------------------------------------------------------
def test_paths_are_expanded_where_they_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "/data set")
    launch = compose("ppo", ["model.path=~/m=1, x", "data.train.path=$WHERE/é.jsonl", "output.root=${WHERE}/runs $5"])
    actor = launch.roles["actor"]
    assert isinstance(actor, LanguageModelConfig) and actor.model.path == f"{tmp_path}/m=1, x"
    assert launch.run.data.train.path == "/data set/é.jsonl" and launch.run.output.root == "/data set/runs $5"
    assert kept(launch, "actor.model.path") == "~/m=1, x"
    assert compose("ppo", ["model.path=/m", "data.train.system=~ $WHERE"]).run.data.train.system == "~ $WHERE"


def test_a_variable_that_is_not_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    assert failure("model.path=/m", "output.root=$NOT_SET/x") == (
        "output.root: $NOT_SET is not set in the environment, got '$NOT_SET/x'"
    )


def test_every_key_that_names_a_file_is_a_path() -> None:
    paths = {key for key, kind in typed.keys(root_type(load_recipe("ppo"))).items() if "path" in key.split(".")[-1]}
    assert paths and all(
        PathText in (kind, *typed.typing.get_args(kind))
        for key, kind in typed.keys(root_type(load_recipe("ppo"))).items()
        if key in paths
    )


# --- what was probably meant ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model=/models/llama", "a folder is given as model.path=/models/llama"),
        ("model=meta-llama/Llama-3-8B", "is given as model.path=meta-llama/Llama-3-8B"),
        ("task=data/train.jsonl", "task=none data.train.path=data/train.jsonl"),
        ("data.train.systm=Answer (A), (B)", "did you mean data.train.system?"),
        ("data.train.generator_args={a: (}", "cannot read the override"),
    ],
)
def test_an_override_that_cannot_be_says_what_was_meant(override: str, expected: str) -> None:
    assert expected in failure("model.path=/m", override)


@pytest.mark.parametrize(("spec", "name"), [("PPO", "ppo"), ("Safe_RLHF", "safe_rlhf"), ("gpro", "grpo")])
def test_a_recipe_is_suggested_whatever_the_case(spec: str, name: str) -> None:
    assert f"did you mean {name}?" in failure(recipe=spec)


# --- settings files ------------------------------------------------------------------------------------------------
VARIED = ["model.path=/m", "placement=split", "name=costs ${5", "data.train.system='a', b"]


@pytest.mark.parametrize("recipe", of_each_shape())
def test_a_runs_config_runs_again(recipe: str, tmp_path: Path) -> None:
    kinds = load_recipe(recipe).roles.items()
    trained = next(name for name, kind in kinds if base_of(kind) in (LanguageModel, ValueModel))
    task = "chain_sum" if recipe in ("ppo", "grpo", "remax") else "none"
    first = compose(recipe, [*VARIED, f"task={task}", f"{trained}.optimizer.lr=3e-7", *sources_of(recipe)])
    (tmp_path / "config.yaml").write_text(first.yaml)
    again = compose(recipe, [], str(tmp_path / "config.yaml"))
    assert yaml.safe_load(again.yaml) == yaml.safe_load(first.yaml)
    assert (again.run, again.roles) == (first.run, first.roles)


def test_overrides_come_after_the_file_and_what_follows_still_follows(tmp_path: Path) -> None:
    own = ["critic.model.path=/c", "actor.optimizer.lr=3e-7"]
    (tmp_path / "c.yaml").write_text(compose("ppo", [*VARIED, "task=chain_sum", *own]).yaml)
    changed = compose("ppo", ["model.path=/new", "task=gcd", "steps=3", "placement=colocate"], str(tmp_path / "c.yaml"))
    assert (read(changed, "actor.model.path"), read(changed, "critic.model.path")) == ("/new", "/c")
    assert changed.run.data.train.generator == "gcd" and "min_terms" not in changed.run.data.train.generator_args
    assert list(changed.run.placement.pools) == ["main"] and changed.run.steps == 3
    assert read(changed, "actor.optimizer.lr") == 3e-7


def test_a_file_is_written_as_one_writes_overrides(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "model: smollm2\ntask: gcd\nname: price $5 ${x}\nactor.optimizer.lr: 1e-6\n"
        "actor: {engine: deepspeed, rollout: {max_response_tokens: 9}}\nsteps: ${seed}\nseed: 3\n"
        "placement: {roles: {default: a}, pools: {a: {slots: 1}}}\n"
    )
    launch = compose("grpo", ["data.heldout=null"], str(tmp_path / "mine.yaml"))
    assert (launch.run.name, launch.run.steps, read(launch, "actor.engine.name")) == ("price $5 ${x}", 3, "deepspeed")
    assert read(launch, "actor.optimizer.lr") == 1e-6 and read(launch, "actor.rollout.max_response_tokens") == 9
    assert list(launch.run.placement.pools) == ["a"], "a mapping with names of one's own is replaced whole"
    assert compose_dataflow("grpo", [], str(tmp_path / "mine.yaml")).name == "grpo"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 1\nsteps: 2\n", "steps is there twice"),
        ("data: {prompts_per_step: 1}\ndata.prompts_per_step: 2\n", "data.prompts_per_step is there twice"),
        ("actor: {optimiser: {lr: 1}}\n", "did you mean actor.optimizer?"),
        ("- a\n", "must hold settings as key: value, got list"),
        ("a: [", "is not YAML"),
        ("placement: auto\n", "on the command line, as placement=auto"),
        ("model: qwen\n", "model=qwen does not exist"),
    ],
)
def test_a_mistake_in_a_settings_file_names_the_file(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    found = failure(config=str(tmp_path / "mine.yaml"))
    assert expected in found and "mine.yaml" in found
    assert "no such file" in failure(config="gone.yaml")


def test_the_config_of_another_recipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# rlhf-dist run grpo --config x name=y\nalgorithm: {scale: true}\n")
    assert "c.yaml (of recipe grpo): unknown key algorithm.scale" in failure(config=str(tmp_path / "c.yaml"))


MINE = '''
from dataclasses import dataclass
from rlhf_dist.dataflow.recipe import follows, recipe
from rlhf_dist.roles import Actor, Prompts

@dataclass(frozen=True, kw_only=True)
class Mine:
    longest: int = follows("actor.rollout.max_response_tokens")
    """Longest response, tokens."""

@recipe
def mine(prompts: Prompts, actor: Actor, cfg: Mine):
    actor.generate_sequences(prompts, n=cfg.longest)
'''


def test_a_recipe_reads_a_shared_setting_without_a_copy(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    spec, base = str(tmp_path / "mine.py"), ["model.path=/m", "actor.rollout.max_response_tokens=33"]
    assert compose(spec, base).algorithm.longest == 33
    assert compose(spec, [*base, "algorithm.longest=4"]).algorithm.longest == 4
    assert compose_dataflow(spec, base)["actor.generate_sequences"].kwargs["n"] == 33


def test_a_yaml_beside_a_recipe_needs_no_defaults_list(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "mine.yaml").write_text(
        "# settings of mine\nmodel: smollm2\ntask: chain_sum\nactor:\n  engine: deepspeed\n  optimizer: {lr: 1e-5}\n"
    )
    launch = compose(str(tmp_path / "mine.py"))
    assert launch.run.name == "mine" and launch.run.data.train.generator == "chain_sum"
    assert read(launch, "actor.engine.name") == "deepspeed" and read(launch, "actor.optimizer.lr") == 1e-5
    assert read(launch, "actor.model.path") == "models/smollm2" and list(launch.run.placement.pools) == ["main"]


def test_an_option_on_the_command_line_replaces_what_a_run_s_file_says_about_it_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(compose("grpo", ["model=smollm2", "task=chain_sum"]).yaml)
    again = compose("grpo", ["task=addition"], str(file))
    fresh = compose("grpo", ["model=smollm2", "task=addition"])
    assert again.yaml == fresh.yaml
    other = compose("grpo", ["model=demo"], str(file))
    assert {other.roles[role].model.path for role in ("actor", "reference")} == {"runs/demo/model"}
