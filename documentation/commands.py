"""Commands and blocks of code in README and docs, as a reader would type them, for the tests that try them.

A command is a line of an indented or plain block, or inline code, that begins with a program. Two spaces or more end
it: what follows is said about it. `\\` at the end goes on in the next line; `...` stands for settings that are left
out, `[x]` for what may be left out, `a|b` for one of several.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("rlhf-dist", "make", "python", "pytest", "ray", "hf", "pip", "source", "eval", "git", "tensorboard", "ssh")
OTHERS = re.compile(r"^(?:\.venv/bin/)?([a-z-]+)(?= |$)")
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One line to type."""

    page: str
    text: str
    words: tuple[str, ...]
    """Without `...` and brackets."""
    spoken: bool
    """Whether it stands within a sentence, where it may be a part of a command."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block."""

    page: str
    language: str
    code: str


def pages() -> list[Path]:
    """README and the pages of the docs, but for decisions."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Its fenced blocks, in order."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [Block(page=page.name, language=language.strip(), code=code) for language, code in found]


def commands(page: Path) -> list[Command]:
    """Its commands, each once."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = {one: True for one in _inline(text)} | {one: False for one in _lines(text)}
    return [made for one, spoken in found.items() if (made := _command(page.name, one, spoken)) is not None]


def _lines(text: str) -> Iterator[str]:
    """Lines of indented blocks, continued ones as one."""
    for match in re.finditer(r"^ {4}((?:.*\\\n)*.*)$", text, re.MULTILINE):
        yield re.sub(r"\s*\\\n\s*", " ", match[1]).removeprefix("$ ")


def _inline(text: str) -> Iterator[str]:
    """Code within sentences that is a whole command."""
    prose = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    for match in re.finditer(r"`((?:rlhf-dist|make) [^`]+)`", prose):
        yield " ".join(match[1].split())


def _command(page: str, line: str, spoken: bool) -> Command | None:
    program = OTHERS.match(line)
    if program is None or program[1] not in PROGRAMS:
        return None
    text = _before_remark(re.sub(r"^(\S+ \S+) {2,3}(?=\S)", r"\1 ", line))
    plain = re.sub(r"(?<=\s)\[([^\]=]*)\]", r"\1", text).split(" | ")[0]
    words = shlex.split(plain)
    if ">" in words:
        words = words[: words.index(">")]
    kept = [word if "=" in word else word.split("|")[0] for word in words if word != "..."]
    return Command(page=page, text=text, words=tuple(kept), spoken=spoken)


def _before_remark(line: str) -> str:
    """Up to two spaces outside quotes that no option and no setting follows."""
    quote = ""
    for at, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif line[at : at + 2] == "  " and not re.match(r" +(-|[\w.]+=|JOB\b)", line[at:]):
            return line[:at]
    return line
