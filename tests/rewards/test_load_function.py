"""Functions named in the config."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.python_files import load_file
from rlhf_dist.rewards import exact_match, load_function

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass(frozen=True)
class Settings:
    size: int = 3

LENGTH = 5

def length_reward(prompt: str, response: str, answer: str) -> float:
    return float(len(response))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_a_function_is_found_in_a_module_a_file_and_the_recipes_own_file(file: Path) -> None:
    assert load_function("rlhf_dist.rewards:exact_match") is exact_match
    assert load_function(f"{file}:length_reward")("", "four", "") == 4.0
    assert load_function("length_reward", file) is load_function(f"{file}:length_reward")


def test_a_file_is_executed_once_and_its_dataclasses_work(file: Path) -> None:
    module = load_file(file)
    assert module.Settings().size == 3
    assert load_file(str(file)) is module


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{file}:lenght_reward", "has no 'lenght_reward'; did you mean 'length_reward'"),
        ("{file}:zzz", "it has .*length_reward"),
        ("{file}:LENGTH", "must be a function, got a int"),
        ("{file}.missing.py:f", "no Python file"),
        ("no_such_package.rewards:f", "no module 'no_such_package'"),
        ("rlhf_dist.rewards:exactmatch", "did you mean 'exact_match'"),
        ("alone", "needs a place to look in"),
        ("module:", "module:name, file.py:name or name"),
    ],
)
def test_what_is_not_there_is_named(spec: str, message: str, file: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_function(spec.format(file=file))


def test_an_error_inside_the_users_file_passes_through_and_can_be_fixed(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_library_of_theirs")
    with pytest.raises(ModuleNotFoundError, match="no_such_library_of_theirs"):
        load_function(f"{path}:f")
    path.write_text("def f(): return 7  # now it works")
    assert load_function(f"{path}:f")() == 7
