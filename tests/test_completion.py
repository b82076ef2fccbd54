"""What the shell is told: recipes, settings, and the words a setting may be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from controller.commands.cli import main

PROGRAM = str(Path(sys.executable).with_name("rlhf-dist"))


def completed(line: str, answer: Path) -> list[str]:
    """What is offered at the end of `line`, asked as a shell asks."""
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    environment = {
        **os.environ,
        **asked,
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "PYTHONPATH": str(Path.cwd()),
    }
    subprocess.run([PROGRAM], env=environment, timeout=60, check=False, capture_output=True)
    return [word.strip() for word in answer.read_text().split("\n") if word.strip()]


def test_recipes_settings_and_words_are_offered(tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    assert "grpo" in completed("rlhf-dist run gr", answer)
    assert "actor.optimizer.lr=" in completed("rlhf-dist run grpo actor.opt", answer)
    assert set(completed("rlhf-dist run grpo actor.engine=", answer)) >= {"actor.engine=fsdp", "actor.engine=deepspeed"}
    assert "task=gcd" in completed("rlhf-dist run grpo task=", answer)
    assert completed("rlhf-dist run grpo data.train.shuffle=t", answer) == ["data.train.shuffle=true"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_its_code(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "rlhf-dist" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rnu", "ppo"], "unknown command rnu; did you mean run?"),
        (["PPO"], "did you mean `rlhf-dist run ppo`?"),
        (["frobnicate"], "there is data, demo"),
    ],
)
def test_a_command_that_does_not_exist_names_the_nearest(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert expected in printed and printed.startswith("error: ") and printed.count("\n") == 1


def test_versions_and_columns_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and "torch 2." in capsys.readouterr().out
    assert main(["columns"]) == 0
    assert "response_mask" in capsys.readouterr().out
