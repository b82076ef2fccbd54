"""What travels with a job, and what is left out or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from controller.submission import files as module
from controller.submission.files import job_files
from rlhf_dist.typed import ConfigError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project: a recipe with its modules, data beside it, and much that must stay."""
    for name in (
        *("project/mine.py", "project/mine.yaml", "project/sibling.py", "project/package/__init__.py"),
        *("project/.env", "project/.git/config", "project/__pycache__/x.pyc", "project/venv/pyvenv.cfg"),
        *("project/scratch/a.txt", "project/deep/keep.txt", "project/deep/drop.log", "project/big.bin"),
        *("data/rows.jsonl", "data/part-1.parquet", "data/part-2.parquet", "other/rew.py", "other/near.py"),
        *("plan.yaml", "unrelated.txt"),
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    (tmp_path / "project" / ".gitignore").write_text("scratch/\n*.bin\n")
    (tmp_path / "project" / "deep" / ".rayignore").write_text("*.log\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PROJECT = [
    "project/deep/keep.txt",
    "project/mine.py",
    "project/mine.yaml",
    "project/package/__init__.py",
    "project/sibling.py",
]


def taken(here: Path, spec: str, settings: dict[str, object] | None = None, *overrides: str) -> list[str]:
    return sorted(map(str, job_files(spec, yaml.safe_dump(settings or {}), overrides, here).files))


def test_the_recipe_s_folder_travels_without_what_its_ignore_files_name(here: Path) -> None:
    found = job_files("project/mine.py:two", "{}", (), here)
    assert sorted(map(str, found.files)) == PROJECT and found.spec == "project/mine.py:two"
    assert found.left_out == 5  # scratch/, big.bin, drop.log, .env, .git
    assert "5 files, 0.0 KiB: project/deep/keep.txt, project/mine.py" in str(found) and "5 left out" in str(found)


def test_what_a_relative_path_names_travels_to_the_same_place(here: Path) -> None:
    settings = {
        "data": {"train": {"path": "data/rows.jsonl", "generator": None}, "heldout": {"path": "/data/x.jsonl"}},
        "reward": {"function": "other/rew.py:f"},
        "name": "data",
    }
    assert taken(here, "grpo", settings, "placement=plan.yaml") == [
        "data/rows.jsonl", "other/near.py", "other/rew.py", "plan.yaml"
    ]  # fmt: skip
    assert taken(here, "grpo", {"path": "data/part-*.parquet"}) == ["data/part-1.parquet", "data/part-2.parquet"]
    assert taken(here, "grpo", {"path": "data/rows.jsonl, data/part-1.parquet"}) == [
        "data/part-1.parquet", "data/rows.jsonl"
    ]  # fmt: skip
    assert taken(here, "grpo", {"path": "nothing.jsonl", "function": "rlhf_dist.rewards:exact_match"}) == []


def test_an_ignored_file_that_is_named_travels(here: Path) -> None:
    assert taken(here, "project/mine.py", {"path": "project/big.bin"}) == sorted([*PROJECT, "project/big.bin"])


def test_a_recipe_from_elsewhere_keeps_its_folder_s_name(here: Path) -> None:
    found = job_files(str(here / "project" / "mine.py"), "{}", (), here / "data")
    assert found.spec == "project/mine.py" and sorted(map(str, found.files)) == PROJECT
    with pytest.raises(ConfigError, match="project/mine.py lies outside of .*run the command from a folder above"):
        job_files("ppo", "{path: ../project/mine.py}", (), here / "data")


def test_too_much_is_refused_by_its_largest_files(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 3000)
    (here / "project" / "sibling.py").write_text("#" * 2048)
    (here / "project" / "mine.yaml").write_text("#" * 1024)
    with pytest.raises(
        ConfigError, match=r"at most 2.9 KiB.*largest: project/sibling.py \(2.0 KiB\), project/mine.yaml"
    ):
        job_files("project/mine.py", "{}", (), here)
