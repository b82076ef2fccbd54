"""`rlhf-dist stacks RUN`: where every process of a run that goes on stands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from controller.commands.registry import Commands


def register(commands: Commands) -> None:
    """`stacks`."""
    stacks = commands.add(
        "stacks", stacks_command, "print where every process of a run that goes on stands", "stacks runs/ppo"
    )
    stacks.add_argument("run", metavar="RUN", type=Path, help="the run's folder, e.g. runs/ppo")
    stacks.add_argument("--timeout", metavar="SECONDS", type=float, default=60.0, help="longest wait; default: 60")


def stacks_command(arguments: argparse.Namespace) -> int:
    """Ask, and print. Raises ConfigError for what is no run that goes on, ClusterError where it does not answer."""
    from controller.cluster.stacks import ask_for_stacks
    from controller.lifecycle.folder_lock import owner_of
    from controller.lifecycle.run_folder import is_run
    from rlhf_dist.typed import ConfigError

    folder: Path = arguments.run
    if not folder.is_dir() or not is_run(folder):
        raise ConfigError(f"{folder} is not the folder of a run; give one, e.g. runs/ppo")
    if arguments.timeout <= 0:
        raise ConfigError(f"--timeout must be more than 0 seconds, got {arguments.timeout:g}")
    state, _ = owner_of(folder)
    if state not in ("live", "watch"):
        raise ConfigError(
            f"{folder} is of a run that is not under way; stacks of calls that failed are in {folder}/logs"
        )
    file = ask_for_stacks(folder, arguments.timeout)
    print(file.read_text(encoding="utf-8"))
    print(f"kept as {file}", file=sys.stderr)
    return 0
