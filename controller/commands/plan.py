"""`rlhf-dist plan` and `rlhf-dist profile`. Loads no torch, ray or vllm to plan; profiling needs torch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from controller.commands.registry import Commands, users_mistakes

FORMATS = ("table", "json", "yaml")
SLOW_SEARCH_S = 0.5
"""Searches longer than this are not repeated for other hardware unless asked for."""


def register(commands: Commands) -> None:
    """`plan` and `profile`."""
    plan = commands.add(
        "plan", plan_command, "find the best placement on a cluster, without a GPU",
        "plan ppo --cluster 2x8xH100 model.path=llama3-8b data.prompts_per_step=512",
        "plan --case case.yaml --format json",
    )  # fmt: skip
    plan.add_argument("recipe", metavar="RECIPE", nargs="?", help="a recipe's name, or path/to/file.py[:name]")
    plan.add_argument("overrides", metavar="key=value", nargs="*", help="settings, e.g. model.path=llama3-8b")
    plan.add_argument(
        "--config", metavar="FILE", help="settings in YAML, e.g. runs/NAME/config.yaml; key=value go last"
    )
    plan.add_argument("--cluster", metavar="NxGxKIND", help="such as 16x8xA100-80G; left out: this machine")
    plan.add_argument("--case", metavar="FILE", help="the whole question in one YAML file, instead of RECIPE")
    plan.add_argument("--placement", help="auto (usual), colocate, split, standalone or async (with RECIPE)")
    plan.add_argument("--prompt-tokens", metavar="N[:MAX]", help="mean (and longest) prompt; left out: the limit")
    plan.add_argument("--response-tokens", metavar="N[:MAX]", help="mean (and longest) response; left out: the limit")
    plan.add_argument("--calibration", metavar="FILE", help="measured efficiencies (rlhf-dist profile)")
    plan.add_argument(
        "--runnable",
        action="store_true",
        help="with --case: only strategies that the engines here have (always so with RECIPE, and for yaml)",
    )
    plan.add_argument("--format", choices=FORMATS, default="table", help="yaml: a file for run RECIPE placement=FILE")
    plan.add_argument("--json", dest="format", action="store_const", const="json", help="--format json")
    plan.add_argument("--yaml", dest="format", action="store_const", const="yaml", help="--format yaml")
    plan.add_argument("--runners-up", type=int, default=3, metavar="N", help="best plans of other partitions to show")
    plan.add_argument("--other-hardware", action="store_true", help="what other hardware brings, even if it takes long")
    plan.add_argument("--png", metavar="FILE", help="draw the simulated timeline")
    profile = commands.add(
        "profile", profile_command, "measure this machine for the planner, about 20 s", "profile --out here.yaml"
    )
    profile.add_argument("--out", default="calibration.yaml", metavar="FILE", help="where to write (calibration.yaml)")
    profile.add_argument(
        "--address", metavar="ADDRESS", help="measure every node of this Ray cluster; the slowest counts"
    )


def plan_command(arguments: argparse.Namespace) -> int:
    """Plan and print. Raises UserError for a question that cannot be."""
    with users_mistakes():
        return _plan(arguments)


def _plan(arguments: argparse.Namespace) -> int:
    from rlhf_dist.planner.emit import as_yaml
    from rlhf_dist.planner.explain import as_json, as_table, what_else
    from rlhf_dist.planner.plan import make_plan
    from rlhf_dist.typed import ConfigError

    if arguments.runners_up < 0:
        raise ConfigError(f"--runners-up must be at least 0, got {arguments.runners_up}")
    _check_file(arguments.png, "--png", (".png", ".pdf", ".svg"))
    question = _question(arguments)
    plan = make_plan(question, arguments.runners_up)
    if arguments.format == "yaml":
        text = as_yaml(plan)
    else:
        searched = question.request.kind != "pools" and not question.request.wanted
        quick = plan.search_s < SLOW_SEARCH_S and arguments.format == "table"
        others = what_else(plan) if searched and (quick or arguments.other_hardware) else None
        text = as_table(plan, others) if arguments.format == "table" else json.dumps(as_json(plan, others), indent=2)
    print(text.rstrip())
    if arguments.png:
        from rlhf_dist.planner.picture import draw_timeline

        draw_timeline(plan, Path(arguments.png).expanduser())
        print(f"wrote {arguments.png}", file=sys.stderr)
    return 0


def profile_command(arguments: argparse.Namespace) -> int:
    """Measure and write a calibration file."""
    from controller.record.profiling import profile_cluster, profile_machine

    _check_file(arguments.out, "--out")
    found = profile_cluster(arguments.address) if arguments.address else profile_machine()
    Path(arguments.out).expanduser().write_text(found.text)
    print(found.text.rstrip())
    print(f"wrote {arguments.out}; use it with plan --calibration {arguments.out}", file=sys.stderr)
    return 0


def _check_file(path: str | None, option: str, endings: tuple[str, ...] = ()) -> None:
    """Before the work, whether its result can be written. Raises ConfigError."""
    from rlhf_dist.typed import ConfigError

    if path is None:
        return
    folder = Path(path).expanduser().parent
    if not folder.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {str(folder)!r}; make it first")
    if endings and not path.endswith(endings):
        raise ConfigError(f"{option} {path}: must end in {', '.join(endings)}")


def _question(arguments: argparse.Namespace) -> Any:
    from dataclasses import replace

    from rlhf_dist.planner.calibration import apply_gpu, load_calibration
    from rlhf_dist.planner.launch import runnable_space
    from rlhf_dist.typed import ConfigError

    if arguments.case:
        beside = {
            "RECIPE": arguments.recipe,
            "--cluster": arguments.cluster,
            "--placement": arguments.placement,
            "--prompt-tokens": arguments.prompt_tokens,
            "--response-tokens": arguments.response_tokens,
        }
        for what, value in beside.items():
            if value:
                raise ConfigError(
                    f"--case holds the whole question; leave {what} out, or change it in {arguments.case}"
                )
        from rlhf_dist.planner.case import read_case

        question = read_case(arguments.case)
    elif arguments.recipe:
        question = _launched(arguments)
    else:
        raise ConfigError("plan needs a RECIPE (rlhf-dist plan ppo --cluster 2x8xH100 ...) or --case FILE")
    if arguments.calibration:
        efficiency, measured = load_calibration(arguments.calibration, question.efficiency)
        question = replace(question, efficiency=efficiency, cluster=apply_gpu(question.cluster, measured))
    if arguments.recipe or arguments.runnable or arguments.format == "yaml":
        for name, given in question.request.wanted.items():
            if given.get("pp", 1) > 1:
                raise ConfigError(
                    f"{name} is asked to run as pp: {given['pp']}, and no engine here has pipelines; set 1"
                )
        question = replace(question, space=runnable_space(question.cluster))
    return question


def _launched(arguments: argparse.Namespace) -> Any:
    from dataclasses import replace

    from rlhf_dist.compose import compose
    from rlhf_dist.hardware import parse_cluster
    from rlhf_dist.placement.file import AUTO, asked_placement
    from rlhf_dist.planner.asked import asked_strategies
    from rlhf_dist.planner.case import parse_request
    from rlhf_dist.planner.launch import hardware_of, problem_of
    from rlhf_dist.planner.plan import Question
    from rlhf_dist.typed import ConfigError

    file, overrides = asked_placement(arguments.overrides)
    if file not in (None, AUTO):
        raise ConfigError(f"placement={file} is planned already; leave it out here, or give it to run")
    launch = compose(arguments.recipe, overrides, arguments.config)
    set_by_hand = [text.partition("=")[2] for text in overrides if text.startswith("placement=")]
    preset = arguments.placement or (set_by_hand[-1] if set_by_hand else "auto")
    strategies, ignored = asked_strategies(launch, overrides)
    if ignored:
        print(f"note: the planner does not model {', '.join(ignored)}; this is the plan without", file=sys.stderr)
    asked = None if arguments.cluster is None else parse_cluster(arguments.cluster, key="--cluster")
    cluster, efficiency, _ = hardware_of(launch, asked)
    prompt = _lengths(arguments.prompt_tokens, "--prompt-tokens")
    response = _lengths(arguments.response_tokens, "--response-tokens")
    _say_defaults(overrides, prompt, response)
    problem = problem_of(launch, prompt, response)
    if preset == "async" and not problem.staleness:
        problem = replace(problem, dataflow=replace(problem.dataflow, staleness=1))
    request = parse_request({"preset": preset, "strategies": strategies}, problem, cluster.gpus)
    return Question(
        name=launch.recipe.name,
        problem=problem,
        cluster=cluster,
        efficiency=efficiency,
        request=request,
        evaluations=_evaluations(launch),
    )


def _evaluations(launch: Any) -> tuple[Any, ...]:
    from rlhf_dist.held_out import evaluation_graphs

    if launch.run.data.heldout is None:
        return ()
    output = launch.run.output
    when = {"every": output.evaluate_every, "beside": output.evaluate_beside}
    return evaluation_graphs(launch.recipe, launch.dataflow, launch.algorithm, **when)


def _say_defaults(overrides: list[str], prompt: Any, response: Any) -> None:
    """Say on stderr where lengths come from that nobody asked for: those of a recipe's usual task are short."""
    keys = {text.lstrip("+").partition("=")[0] for text in overrides}
    unsaid = []
    if prompt is None and not keys & {"task", "data.max_prompt_tokens"}:
        unsaid.append("prompts are (--prompt-tokens, task=... or data.max_prompt_tokens=...)")
    if response is None and not any(key.endswith("max_response_tokens") for key in keys):
        unsaid.append("responses are (--response-tokens or ...max_response_tokens=...)")
    if unsaid:
        print(
            f"note: not said how long {' and '.join(unsaid)}; planned at the limits of the default task",
            file=sys.stderr,
        )


def _lengths(text: str | None, key: str) -> Any:
    from rlhf_dist.planner.workload import parse_lengths
    from rlhf_dist.typed import ConfigError

    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError as error:
        raise ConfigError(f"{key} must be a mean, or MEAN:MAX, in tokens, such as 800:2048, got {text!r}") from error
    if len(numbers) > 2:
        raise ConfigError(f"{key} must be a mean, or MEAN:MAX, in tokens, such as 800:2048, got {text!r}")
    return parse_lengths(numbers[0] if len(numbers) == 1 else {"mean": numbers[0], "max": numbers[1]}, key)
