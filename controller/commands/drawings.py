"""`rlhf-dist graph`, `timeline` and `config`: a recipe's dataflow, a run's pools, all settings."""

from __future__ import annotations

import argparse
from pathlib import Path

from controller.commands.registry import Commands, users_mistakes


def register(commands: Commands) -> None:
    """`graph`, `timeline` and `config`."""
    graph = commands.add(
        "graph", graph_command, "draw the recipe's dataflow", "graph ppo", "graph ppo --format mermaid", launch=True
    )
    graph.add_argument("--format", choices=("text", "mermaid", "dot", "json"), default="text")
    timeline = commands.add(
        "timeline", timeline_command, "draw what a run's pools did when, as PNG", "timeline runs/ppo --steps 3-5"
    )
    timeline.add_argument("run", metavar="RUN", help="the run's folder, e.g. runs/ppo")
    timeline.add_argument("--output", metavar="FILE", help="default: RUN/timeline.png")
    timeline.add_argument("--steps", metavar="FIRST-LAST", type=_step_range, help="only these steps")
    config = commands.add(
        "config", config_command, "show all settings as they will be used",
        "config ppo model=smollm2 task=chain_sum", "config grpo --plain", launch=True,
    )  # fmt: skip
    config.add_argument("--plain", action="store_true", help="without the explanations: YAML for --config")


def graph_command(arguments: argparse.Namespace) -> int:
    """Print the graph of a step, and those of held-out rows."""
    from rlhf_dist.compose import compose_graphs
    from rlhf_dist.dataflow.draw import FORMATS

    with users_mistakes():
        dataflow, evaluations = compose_graphs(arguments.recipe, arguments.overrides, arguments.config)
    print(FORMATS[arguments.format](dataflow, evaluations))
    return 0


def timeline_command(arguments: argparse.Namespace) -> int:
    """Draw, and print the file's path."""
    from controller.record.timeline import draw

    target = None if arguments.output is None else Path(arguments.output)
    print(draw(Path(arguments.run), target, arguments.steps))
    return 0


def config_command(arguments: argparse.Namespace) -> int:
    """Print the settings as YAML."""
    from rlhf_dist.compose import root_type
    from rlhf_dist.field_docs import annotate, field_docs
    from rlhf_dist.planner.launch import compose_planned

    with users_mistakes():
        launch = compose_planned(arguments.recipe, arguments.overrides, arguments.config)
    print(launch.yaml.rstrip() if arguments.plain else annotate(launch.yaml, field_docs(root_type(launch.recipe))))
    return 0


def _step_range(text: str) -> range:
    first, _, last = text.partition("-")
    try:
        return range(int(first), int(last or first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a step or a range such as 3-5, got {text!r}") from None
