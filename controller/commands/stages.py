"""`rlhf-dist run FILE.yaml` and `check FILE.yaml`: several recipes in one launch."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_dist.hardware import Cluster
    from rlhf_dist.stages import Stages


def are_stages(recipe: str) -> bool:
    """Whether what stands for a recipe on the command line is a file of stages."""
    from rlhf_dist.recipe_files import STAGES, stages_of

    return stages_of(recipe).endswith(STAGES)


def check_stages_command(arguments: argparse.Namespace, cluster: Cluster | None) -> int:
    """Check every stage, and print the plan of each. Raises ConfigError, naming the stage."""
    from controller.lifecycle.stages import check_stages

    checked = check_stages(_stages(arguments), cluster=cluster)
    if arguments.format == "json":
        print(json.dumps({"ok": True, "stages": {one.stage.name: {"plan": one.lines} for one in checked}}))
        return 0
    for number, one in enumerate(checked, start=1):
        print(f"--- stage {number} of {len(checked)}: {one.stage.name}")
        print("\n".join([*one.lines, f"folder    {one.beginning.folder}: {one.note}", ""]))
    print("ok: settings, graphs, batch arithmetic, memory and the models handed over fit together")
    return 0


def run_stages_command(arguments: argparse.Namespace, quiet: bool) -> int:
    """Run the stages that are not complete. Raises ConfigError or StageFailed, naming the stage."""
    from controller.lifecycle.stages import run_stages

    stages = _stages(arguments)
    run_stages(stages, local=arguments.local, eager=arguments.eager, quiet=quiet)
    path = stages.folder / "summary.json"
    print(json.dumps(json.loads(path.read_text())) if arguments.format == "json" else path)
    return 0


def _stages(arguments: argparse.Namespace) -> Stages:
    from rlhf_dist.stages import read_stages
    from rlhf_dist.typed import ConfigError

    if arguments.config is not None:
        raise ConfigError(f"--config belongs to one recipe; write settings of stages into {arguments.recipe}")
    return read_stages(arguments.recipe, arguments.overrides)
