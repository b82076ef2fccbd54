"""`rlhf-dist completion`: what a shell has to read to complete the command line."""

from __future__ import annotations

import argparse

from controller.commands.completion import SHELLS, shell_code
from controller.commands.registry import Commands


def register(commands: Commands) -> None:
    """`completion`."""
    completion = commands.add(
        "completion",
        completion_command,
        "make the shell complete: eval its output",
        "completion bash",
        "completion fish",
    )
    completion.add_argument("shell", choices=SHELLS)


def completion_command(arguments: argparse.Namespace) -> int:
    """Print the shell's code."""
    print(shell_code(arguments.shell))
    return 0
