"""README and docs: every command parses and its settings compose, blocks are what they say, every page is linked."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import controller
from controller.commands.cli import _parsed
from controller.commands.registry import Commands, all_commands
from controller.commands.stages import are_stages
from documentation.commands import Command, blocks, commands, pages
from rlhf_dist.compose import compose, compose_dataflow
from rlhf_dist.recipe_files import list_recipes
from rlhf_dist.stages import read_stages
from tests.tiny import save_llama

ROOT = Path(__file__).parent.parent
PAGES = pages()
NAMES = [page.name for page in PAGES]
COMMANDS: Commands = all_commands()
MODELS = ("mine", "llama", "qwen", "judge", "old", "smollm2")
PLACEHOLDERS = {"RECIPE": "grpo", "NAME": "grpo", "runs/NAME": "runs/ppo", "key=value": "steps=3", "SECONDS": "5"}
DUEL = """
from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Opponent, Prompts, Reward
from rlhf_dist.transforms import grpo_advantage

@recipe
def duel(prompts: Prompts, actor: Actor, opponent: Opponent, reward: Reward) -> None:
    batch = opponent.generate_sequences(actor.generate_sequences(prompts, n=2), prefix="response")
    batch = reward.compute_reward(batch)
    actor.update_actor(grpo_advantage(batch), loss=ppo_clip(0.2, on_policy=True))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pages assume it: models, rows, files of earlier runs."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "models").mkdir()
    save_llama(folder / "models/mine")
    for name in MODELS[1:]:
        (folder / "models" / name).symlink_to(folder / "models/mine")
    (folder / "duel.py").write_text(DUEL)
    (folder / "prompts.jsonl").write_text('{"prompt": "2+3=", "answer": "5"}\n' * 8)
    (folder / "runs/grpo").mkdir(parents=True)
    launch = compose("grpo", [f"model.path={folder}/models/mine", "task=addition"])
    (folder / "runs/grpo/config.yaml").write_text(launch.yaml)
    (folder / "plan.yaml").write_text("placement: {pools: {main: {slots: 2}}, roles: {default: main}}\n")
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def written(page: Path, place: Path) -> None:
    """The files that a page shows: blocks that say theirs in a comment, and recipes by their names."""
    shown = blocks(page)
    for block in shown:
        for name in re.findall(r"^# ([\w.]+\.(?:py|yaml))\b", block.code.split("\n\n")[0], re.MULTILINE)[:1]:
            (place / name).write_text(block.code)
    python = [block.code for block in shown if block.language == "python"]
    if page.name == "writing-a-recipe.md":  # one file in parts
        (place / "mine.py").write_text("\n\n".join(python))
        return
    for code in python:
        for name in re.findall(r"^@recipe\ndef (\w+)", code, re.MULTILINE):
            (place / f"{name}.py").write_text(code)
    if page.name == "running.md":
        (place / "mine.yaml").write_text(next(block.code for block in shown if block.language == "yaml"))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_of_a_page_can_be_typed(page: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(page, here)
    faults = [f"{one.text}: {fault}" for one in commands(page) if (fault := fault_of(one, capsys))]
    assert not faults, "\n".join(faults)


def fault_of(command: Command, capsys: pytest.CaptureFixture[str]) -> str:
    """What is wrong with a command; empty for nothing."""
    program, *words = [PLACEHOLDERS.get(word, word) for word in command.words]
    if program == "make":
        targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        unknown = sorted({word for word in words if "=" not in word} - targets)  # ARGS="..." is a variable
        return f"no target {unknown}" if unknown else ""
    if program in ("python", ".venv/bin/python") and words[:1] == ["-m"]:
        return "" if importlib.util.find_spec(words[1]) else f"no module {words[1]}"
    if program != "rlhf-dist":
        known = shutil.which(program) or Path(sys.executable).with_name(program).exists()
        return "" if known or program in ("source", "eval", "ssh", "hf", "pip") else f"no program {program}"
    if words[:1] in (["--version"], ["COMMAND"], ["--help"]):
        return ""
    if words[:1] and words[0] not in COMMANDS.run:
        return f"no command {words[0]}"
    try:
        parsed = _parsed(COMMANDS, words)
    except SystemExit:
        said = capsys.readouterr().err.strip().splitlines()[-1]
        return "" if command.spoken and "arguments are required" in said else said
    return "" if getattr(parsed, "recipe", None) is None else fault_of_settings(command, parsed)


def fault_of_settings(command: Command, parsed: Any) -> str:
    """What is wrong with recipe and settings of a parsed command. What they leave out is filled in."""
    recipe, given = Path(parsed.recipe).name if "path/to" in parsed.recipe else parsed.recipe, parsed.overrides
    if not hasattr(parsed, "config") or recipe == "my_grpo.py":
        return ""
    if command.text.startswith("rlhf-dist graph") or parsed.command in ("graph", "columns"):
        compose_dataflow(recipe, given)
        return ""
    try:
        if are_stages(recipe):
            read_stages(recipe, [*given])
            return ""
        filled = list(given)
        if not parsed.config:
            filled += [] if any(re.match(r"model(\.path)?=", one) for one in given) else ["model.path=models/mine"]
            filled += [] if any(re.match("(task|data.train.path)=", one) for one in given) else ["task=addition"]
        filled = ["model.path=models/mine" if one == "model=demo" else one for one in filled]
        compose(recipe, [one for one in filled if one != "placement=auto"], parsed.config)
    except ValueError as error:
        return expected(command, str(error))
    return ""


def expected(command: Command, error: str) -> str:
    """The error itself, unless the page shows it below the command."""
    page = next(page for page in PAGES if page.name == command.page)
    return "" if f"{command.text}\n    error: {error}" in page.read_text() else error


EXECUTED = [block for page in PAGES for block in blocks(page) if block.language == "python"]


RUNNING = [page for page in PAGES if any(block.page == page.name for block in EXECUTED)]


@pytest.mark.parametrize("page", RUNNING, ids=[page.name for page in RUNNING])
def test_python_of_a_page_runs(page: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are one script; a launch in it is a local one of a step."""
    launches = controller.launch

    def local(recipe: str, *overrides: str, **options: Any) -> Any:
        small = ["model.path=models/mine", "actor.rollout.max_response_tokens=4", "data.prompts_per_step=2", "steps=1"]
        kept = [one for one in overrides if not one.startswith("model=")]
        return launches(recipe, *kept, *small, "task=none", "resume=overwrite", local=True, quiet=True, **options)

    monkeypatch.setattr(controller, "launch", local)
    file = here / f"page_{page.stem.replace('-', '_')}.py"
    file.write_text("\n\n".join(block.code for block in EXECUTED if block.page == page.name))
    runpy.run_path(str(file), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_are_what_they_say(page: Path) -> None:
    for block in blocks(page):
        assert block.language, f"a block says no language: {block.code[:60]!r}"
        read = {"py": ast.parse, "yaml": yaml.safe_load, "json": json.loads}.get(block.language.split()[0])
        if read is not None:
            read(block.code)


def test_every_page_is_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        """Takes what mkdocs adds to YAML as nothing."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    listed = {page for part in yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"] for page in _leaves(part)}
    there = {
        str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "adr"
    }
    made = {"errors.md", "commands.md", "settings.md"}
    assert listed == there | made


def _leaves(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    for below in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _leaves(below)


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    """With every link and anchor of it."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
    build(config)
    errors = (tmp_path / "site/errors.html").read_text()
    assert "attention heads" in errors and (tmp_path / "site/search/search_index.json").stat().st_size > 100_000
    assert "actor.optimizer" in (tmp_path / "site/settings.html").read_text() and list_recipes()
