"""What mkdocs adds to `docs/` when it builds the site: pages made from the sources, and the decisions by number.

errors.md     every message the code can raise      documentation/error_messages.py
commands.md   the help of every command             controller/commands/
settings.md   every setting, of a recipe with all kinds of roles
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from documentation.error_messages import error_messages, errors_page

WIDTH = "100"
"""Columns of help texts."""


def on_config(config: Any) -> Any:
    """Put the decisions into the navigation, by number and title."""
    folder = Path(config.docs_dir)
    decisions = [{_title(file): f"adr/{file.name}"} for file in sorted((folder / "adr").glob("*.md"))]
    config.nav = [*config.nav, {"Decisions": decisions}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    pages = {"errors.md": errors_page(error_messages()), "commands.md": commands_page(), "settings.md": settings_page()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def commands_page() -> str:
    """Help of all commands, as it is printed."""
    from controller.commands.registry import all_commands

    os.environ["COLUMNS"] = WIDTH
    commands = all_commands()
    parts = [f"# Commands\n\n```text\n{commands.parser.format_help()}```\n"]
    parts += [f"\n## {name}\n\n```text\n{parser.format_help()}```\n" for name, parser in commands.parsers.items()]
    return "".join(parts)


def settings_page() -> str:
    """What `rlhf-dist config ppo` prints."""
    from controller.commands.cli import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = main(["config", "ppo", "model.path=MODEL", "task=addition"])
    if code:
        raise RuntimeError("rlhf-dist config ppo must print all settings; run it to see why it does not")
    head = "# Settings\n\nEvery setting of `ppo`, its default and its meaning, as `rlhf-dist config ppo` prints them;"
    return f"{head} a recipe of yours has its own `algorithm` section and roles.\n\n```yaml\n{shown.getvalue()}```\n"


def _title(file: Path) -> str:
    """Of a decision: its number, and its first line without one."""
    number = file.name.split("-")[0]
    first = file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").strip()
    return f"{number} {first.removeprefix(number).lstrip('. ')}"
