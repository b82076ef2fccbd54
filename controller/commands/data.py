"""`rlhf-dist data`: what a recipe's rows come to, before anything is started. Loads no torch, ray or vllm."""

from __future__ import annotations

import argparse
from typing import Any

from controller.commands.registry import Commands, users_mistakes

STYLES = {"prompt": "cyan", "trained": "bold green", "context": "yellow"}
"""Colours; the words beside the text say the same without them."""
MARGIN = 10


def register(commands: Commands) -> None:
    """`data`."""
    data = commands.add(
        "data", data_command, "show samples of what will be trained, token by token",
        "data sft model=smollm2 data.train.path=chats.jsonl --rows 5", launch=True,
    )  # fmt: skip
    data.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (3)")
    data.add_argument("--step", type=int, default=0, metavar="S", help="the step whose rows are shown (the first)")
    which = data.add_mutually_exclusive_group()
    which.add_argument("--heldout", action="store_true", help="rows of data.heldout instead")
    which.add_argument("--source", metavar="NAME", help="rows of this source parameter of the recipe (the first)")


def data_command(arguments: argparse.Namespace) -> int:
    """Read, render and tokenise all rows as a run does; print their counts and a few of them.

    Raises UserError for an option that cannot be, and for faulty settings or data.
    """
    with users_mistakes():
        return _show_data(arguments)


def _show_data(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from rlhf_dist.data import epoch_source, heldout_source, training_source
    from rlhf_dist.data.samples import samples, summary
    from rlhf_dist.planner.launch import compose_planned
    from rlhf_dist.typed import ConfigError

    for name, least in (("rows", 0), ("step", 0)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    launch = compose_planned(arguments.recipe, arguments.overrides, arguments.config)
    name = epoch_source(launch) if arguments.source is None else arguments.source
    source = heldout_source(launch) if arguments.heldout else training_source(launch, name)
    rows_per_step = launch.run.data.prompts_per_step if arguments.heldout else launch.source_rows(name)
    console = Console(highlight=False, soft_wrap=True)  # Without colour where NO_COLOR is set or nobody looks on.
    for line in summary(source, launch.run.data, rows_per_step):
        console.print(line, markup=False)
    for sample in samples(source, arguments.step, arguments.rows, rows_per_step):
        console.print(f"\n{sample.title}", style="bold", markup=False)
        for segment in sample.segments:
            _show(console, segment.kind, segment.text, STYLES[segment.kind])
        if sample.answer is not None:
            _show(console, "answer", sample.answer, "")
    return 0


def _show(console: Any, label: str, text: str, style: str) -> None:
    """The label beside the first line, the text's own lines below each other."""
    from rich.text import Text

    for number, line in enumerate(_visible(text).split("\n")):
        head = label if number == 0 else ""
        console.print(Text(f"{head:<{MARGIN}}").append(line, style))


def _visible(text: str) -> str:
    """Control characters as escapes, so that they cannot move the cursor."""
    return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)
