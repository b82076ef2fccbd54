"""`rlhf-dist run` and `check`: a recipe, or stages in a YAML file."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from controller.commands.registry import Commands, users_mistakes
from controller.commands.stages import are_stages, check_stages_command, run_stages_command

if TYPE_CHECKING:
    from controller.lifecycle.run_folder import Beginning
    from rlhf_dist.compose import Launch
    from rlhf_dist.hardware import Cluster

FORMATS = ("text", "json")


def register(commands: Commands) -> None:
    """`run` and `check`."""
    run = commands.add(
        "run", run_command, "run a recipe, or stages in a YAML file, here or on a cluster",
        "run ppo model=smollm2 task=chain_sum steps=50",
        "run path/to/mine.py model=demo actor.optimizer.lr=1e-5 --local",
        "run grpo --config runs/grpo/config.yaml name=again",
        "run stages.yaml ppo.steps=10 resume=auto",
        "run ppo model=demo task=chain_sum --profile 3",
        "run grpo model=demo task=chain_sum --format json",
        launch=True,
    )  # fmt: skip
    run.add_argument(
        "--quiet", action="store_true", help="no plan and no progress; the summary at the end all the same"
    )
    run.add_argument("--eager", action="store_true", help="line by line: breakpoint() works in the recipe")
    run.add_argument(
        "--local",
        action="store_true",
        help="in this process, without Ray, line by line: breakpoint() works in the recipe, host ops and losses",
    )
    run.add_argument(
        "--profile",
        metavar="STEP",
        type=int,
        action="append",
        help="write traces and memory of every rank at this step to RUN/profile; as profile.steps=[STEP]",
    )
    run.add_argument("--format", choices=FORMATS, default="text", help="json: the summary, and nothing else, on stdout")
    check = commands.add(
        "check", check_command, "find mistakes and show the plan of a step, or of stages",
        "check grpo model=smollm2 task=chain_sum data.prompts_per_step=8",
        "check ppo --cluster 4x8xH100 task=none model.path=llama3-70b model.dtype=bfloat16 --format json",
        launch=True,
    )  # fmt: skip
    check.add_argument(
        "--cluster",
        metavar="NxGxKIND",
        help="a cluster that need not be there, e.g. 4x8xH100; models may be a config.json or a name (llama3-70b)",
    )
    check.add_argument("--format", choices=FORMATS, default="text", help="json: bytes a rank by phase, too")


def run_command(arguments: argparse.Namespace) -> int:
    """Run to the end, and print the summary. Raises UserError, and what `lifecycle.run.run` raises."""
    quiet = arguments.quiet or arguments.format == "json"
    if arguments.profile:
        arguments.overrides.append(f"profile.steps={arguments.profile}".replace(" ", ""))
    if are_stages(arguments.recipe):
        return run_stages_command(arguments, quiet)
    eager = arguments.eager or arguments.local
    launch, plan, _ = _prepared(arguments, local=arguments.local, eager=eager)
    if not quiet:
        print("\n".join(plan), flush=True)
    import psutil

    from controller.lifecycle.run import run
    from controller.record.display import Display
    from controller.record.run_summary import for_people

    with Display(launch.run.name, launch.run.steps, quiet=quiet, lines=eager) as display:
        began_s = psutil.Process().create_time()
        summary = run(launch, display=display, eager=eager, local=arguments.local, began_s=began_s)
        if arguments.format == "json":
            print(json.dumps(summary))
        else:
            display.summary(for_people(summary))
    return 0


def check_command(arguments: argparse.Namespace) -> int:
    """Check, and print the plan. Raises UserError."""
    from rlhf_dist.hardware import parse_cluster

    with users_mistakes():
        cluster = None if arguments.cluster is None else parse_cluster(arguments.cluster, key="--cluster")
    if are_stages(arguments.recipe):
        return check_stages_command(arguments, cluster)
    launch, plan, beginning = _prepared(arguments, cluster=cluster)
    if arguments.format == "json":
        from rlhf_dist.planner.launch_memory import memory_report

        chosen = [{"keys": one.keys, "value": one.value, "why": one.why} for one in launch.choices]
        print(json.dumps({"ok": True, "plan": plan, "auto": chosen, **memory_report(launch, cluster)}))
        return 0
    print("\n".join([*plan, f"folder    {beginning.folder}: {beginning.note or 'new'}"]))
    print("ok: settings, graph, batch arithmetic and memory fit together")
    return 0


def _prepared(
    arguments: argparse.Namespace, local: bool = False, eager: bool = False, cluster: Cluster | None = None
) -> tuple[Launch, list[str], Beginning]:
    """The launch, its plan and where it begins; any ValueError here is about what the user wrote."""
    from controller.lifecycle.prepare import prepared
    from controller.lifecycle.run_folder import find_beginning

    with users_mistakes():
        launch, plan = prepared(
            arguments.recipe, arguments.overrides, arguments.config, local=local, eager=eager, cluster=cluster
        )
        return launch, plan, find_beginning(launch, elsewhere=cluster is not None)
