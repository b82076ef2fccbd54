"""`rlhf-dist scale`: another number of generation replicas, while a run goes."""

from __future__ import annotations

import argparse
from pathlib import Path

from controller.commands.registry import Commands

WAIT_S = 900.0
"""For the end of a step, usually the next one, and the start of new processes."""


def register(commands: Commands) -> None:
    """`scale`."""
    scale = commands.add(
        "scale", scale_command, "grow or shrink the generation of a run that goes on",
        "scale runs/grpo --pool rollout --replicas 4",
    )  # fmt: skip
    scale.add_argument("run", metavar="RUN", help="folder of the run, runs/NAME")
    scale.add_argument("--pool", required=True, help="a pool that only generates, that of placement.rollout")
    scale.add_argument(
        "--replicas", required=True, type=int, metavar="N", help="copies of the model that generate from the next step"
    )
    scale.add_argument("--wait", type=float, default=WAIT_S, metavar="SECONDS", help=f"for it (default {WAIT_S:g})")


def scale_command(arguments: argparse.Namespace) -> int:
    """Ask the run, and show what it says: 0 where the pool has changed, 1 where it has not."""
    from controller.lifecycle.scaling import NotScaled, ask

    answer = ask(Path(arguments.run), arguments.pool, arguments.replicas, arguments.wait)
    if not answer.done:
        raise NotScaled(answer.text)
    print(answer.text)
    return 0
