"""The page of all error messages: none that the sources raise is left out, and those that a user meets are found."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from controller.commands.cli import main
from documentation.error_messages import (
    PACKAGES,
    ROOT,
    Message,
    best_match,
    error_messages,
    errors_page,
    raises,
)

WORDS = re.compile(r"[A-Za-z][a-z]{2,}")


@pytest.fixture(scope="module")
def messages() -> list[Message]:
    return error_messages()


def test_every_raise_is_on_the_page(messages: list[Message]) -> None:
    there = {(message.module, message.line) for message in messages}
    page = errors_page(messages)
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for node in raises(ast.parse(file.read_text())):
                assert (module, node.lineno) in there, f"{file}:{node.lineno}"
                for words in _constants(node):
                    assert words in page, f"{file}:{node.lineno}: its message lacks {words!r}"


def _constants(node: ast.Raise) -> list[str]:
    """Texts that stand in the call of the exception itself, as the page has them: each on one line."""
    texts = (
        [
            part
            for call in ast.walk(node.exc)
            if isinstance(call, ast.Call) and _is_class(call.func)
            for text in [
                *call.args,
                *(part for given in call.args if isinstance(given, ast.JoinedStr) for part in given.values),
            ]
            if isinstance(text, ast.Constant) and isinstance(text.value, str)
            for part in [" ".join(text.value.split())]
        ]
        if node.exc is not None
        else []
    )
    return [text for text in texts if len(WORDS.findall(text)) > 2]


def _is_class(function: ast.expr) -> bool:
    name = function.id if isinstance(function, ast.Name) else ""
    return name.endswith(("Error", "Failed", "Exception")) and name != "CheckFailed"


@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (["check", "ppo", "actor.lr=1e-5"], "rlhf_dist."),
        (["check", "nothing_like_it"], "rlhf_dist.recipe_files"),
        (["check", "ppo", "model.path=no/such/folder", "task=addition"], "rlhf_dist.model_folder"),
        (["jobs", "status"], "controller.commands.submit"),
        (["report", "no/such/run"], "controller."),
    ],
    ids=["key", "recipe", "model", "job", "run"],
)
def test_a_message_that_is_shown_is_found(
    arguments: list[str], module: str, messages: list[Message], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    found = best_match(capsys.readouterr().err, messages)
    assert found is not None and found.module.startswith(module), found


def test_what_a_message_is_made_of_is_followed(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers/one.py").write_text(
        "class Odd(Exception):\n"
        "    def __init__(self, who, what):\n"
        "        super().__init__(f'{who}: {what}')\n"
        "def said(key):\n"
        "    return f'unknown {key}'\n"
        "def run(n):\n"
        "    hint = 'give more' if n else 'give less'\n"
        "    if n:\n"
        "        raise ValueError(f'{said(\"door\")}, got {n}; {hint}')\n"
        "    raise Odd(n, 'is ' + 'odd')\n"
    )
    texts = [message.text for message in error_messages(tmp_path)]
    assert texts == [
        "unknown door, got <n>; give more",
        "unknown door, got <n>; give less",
        "<n>: is odd",
    ]


def test_symptoms_of_the_troubleshooting_page_are_said_by_the_code(messages: list[Message]) -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    sources = " ".join(
        re.sub(r'"\s*\n\s*f?"', "", file.read_text()) for package in PACKAGES for file in (ROOT / package).rglob("*.py")
    )
    said = sources + " ".join(message.text for message in messages)
    rows = re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)
    assert len([row for row in rows if row not in ("symptom", "---")]) >= 20
    for row in rows:
        for symptom in re.findall("`([^`]+)`", row):
            for part in symptom.split("..."):
                assert part.strip() in said, f"nothing says {part.strip()!r} of {symptom!r}"
