"""How a command comes to be: a module of this folder has `register(commands)`, which adds what it can do.

    def register(commands: Commands) -> None:
        graph = commands.add("graph", graph_command, "draw the recipe's dataflow", "graph ppo", launch=True)
        graph.add_argument("--format", ...)

`main` finds the modules and knows no command by name. A module imports what it needs inside its commands: all modules
are loaded for every call, and for the shell's completion.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from controller import commands as folder
from controller.commands.completion import overrides, recipes

EXIT_CODES = """exit codes:
  0    done
  1    the run, the job or a check failed
  2    the command or the settings are wrong; nothing was started
  75   preempted: the run was asked to make room and has saved; start it again with resume=auto
  130  interrupted
"""
BEGIN = """begin with:
  rlhf-dist recipes
  rlhf-dist check grpo model=smollm2 task=chain_sum
  rlhf-dist run path/to/mine.py model=demo actor.optimizer.lr=1e-5
  rlhf-dist report runs/grpo
  rlhf-dist COMMAND --help                    each with examples

"""

Command = Callable[[argparse.Namespace], int]
"""Does what was asked and returns the exit code."""


class UserError(Exception):
    """A mistake of the user's; the message says what to do."""


@contextmanager
def users_mistakes() -> Iterator[None]:
    """Inside, a ValueError is about what the user wrote: one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


class Commands:
    """The parser of the whole command line, and what its commands do."""

    def __init__(self) -> None:
        self.parser = argparse.ArgumentParser(
            prog="rlhf-dist",
            description="Distributed RLHF as a dataflow.",
            epilog=BEGIN + EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._below = self.parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        self.common = argparse.ArgumentParser(add_help=False)
        self.common.add_argument("--traceback", action="store_true", help="show where an error was found")
        self._launch = argparse.ArgumentParser(add_help=False, parents=[self.common])
        recipe = self._launch.add_argument(
            "recipe", metavar="RECIPE", help="a recipe's name, or path/to/file.py[:name]"
        )
        settings = self._launch.add_argument(
            "overrides", metavar="key=value", nargs="*", help="e.g. actor.optimizer.lr=1e-5"
        )
        self._launch.add_argument(
            "--config", metavar="FILE", help="settings in YAML, e.g. runs/NAME/config.yaml; key=value go last"
        )
        recipe.completer, settings.completer = recipes, overrides  # type: ignore[attr-defined]  # argcomplete reads it
        self.run: dict[str, Command] = {}
        """Name -> what it does."""
        self.parsers: dict[str, argparse.ArgumentParser] = {}
        self.examples: dict[str, tuple[str, ...]] = {}

    def add(self, name: str, run: Command, help: str, *examples: str, launch: bool = False) -> argparse.ArgumentParser:
        """A command's parser, for its arguments. examples: command lines without `rlhf-dist`. launch: it takes a
        recipe, settings and --config."""
        assert name not in self.run, f"two modules register the command {name}"
        self.run[name], self.examples[name] = run, examples
        self.parsers[name] = self._below.add_parser(
            name,
            parents=[self._launch if launch else self.common],
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog="examples:\n" + "\n".join(f"  rlhf-dist {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        return self.parsers[name]


def all_commands() -> Commands:
    """Every command of every module in this folder, by the names of the modules."""
    found = Commands()
    for module in sorted(pkgutil.iter_modules(folder.__path__), key=lambda module: module.name):
        register: Any = getattr(importlib.import_module(f"{folder.__name__}.{module.name}"), "register", None)
        if register is not None:
            register(found)
    return found
