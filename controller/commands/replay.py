"""`rlhf-dist replay`: one node of a step of a run once more, here, where `breakpoint()` stops."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from controller.commands.registry import Commands, users_mistakes

if TYPE_CHECKING:
    from controller.lifecycle.replayed import Difference, Replayed


def register(commands: Commands) -> None:
    """`replay`."""
    replay = commands.add(
        "replay", replay_command, "run one node of a step again from the inputs that the run kept, in this process",
        "replay runs/grpo",
        "replay runs/grpo --step 3 --node actor.update_actor",
        "replay runs/grpo --step 3 --node reward.compute_reward --weights start",
    )  # fmt: skip
    replay.add_argument("run", metavar="RUN", type=Path, help="the run's folder, e.g. runs/grpo")
    replay.add_argument(
        "overrides", metavar="key=value", nargs="*", help="settings that are to be others than the run's"
    )
    replay.add_argument("--step", type=int, metavar="N", help="without it: what the run has kept")
    replay.add_argument("--node", metavar="NAME", help="as in the graph, e.g. actor.update_actor")
    replay.add_argument("--weights", metavar="start|step_N", help="other weights than the node ran with")
    replay.add_argument("--format", choices=("text", "json"), default="text", help="json: on stdout, for scripts")


def replay_command(arguments: argparse.Namespace) -> int:
    """Run the node, or list what is there. Raises UserError for what is not, NodeError where the node fails again."""
    from controller.lifecycle.replay import replay
    from rlhf_dist.typed import ConfigError

    with users_mistakes():
        if arguments.step is None and arguments.node is None:
            return _list(arguments.run, arguments.format)
        if arguments.step is None or arguments.node is None:
            raise ConfigError("--step and --node are given together; without both, what is there is listed")
        done = replay(arguments.run, arguments.step, arguments.node, arguments.overrides, arguments.weights)
    print(json.dumps(done.as_json()) if arguments.format == "json" else "\n".join(_text(done)))
    return 0


def _list(run: Path, form: str) -> int:
    from controller.lifecycle.run_folder import is_run
    from rlhf_dist.saved_calls import failure_of, saved_steps, step_folder
    from rlhf_dist.typed import ConfigError

    if not is_run(run):
        raise ConfigError(f"{run} is not the folder of a run; give one, e.g. runs/ppo")
    steps = saved_steps(run)
    failed = {
        step: {node: said for node in nodes if (said := failure_of(step_folder(run, step), node))}
        for step, nodes in steps.items()
    }
    if form == "json":
        print(
            json.dumps({str(step): {node: failed[step].get(node) for node in nodes} for step, nodes in steps.items()})
        )
        return 0
    if not steps:
        print(f"{run} has no inputs of nodes; output.inputs_every=K keeps them every K steps, and failures always")
    for step, nodes in steps.items():
        for node in nodes:
            said = f"   failed: {failed[step][node]}" if node in failed[step] else ""
            print(f"--step {step} --node {node}{said}")
    return 0


def _text(done: Replayed) -> list[str]:
    lines = [f"{done.node} of step {done.step} ({done.line}), {_rows(done)}", f"weights: {done.weights}"]
    if done.failure:
        lines.append(f"in the run it failed: {done.failure}")
    for title, found in (("wrote", list(done.columns())), ("metrics", list(done.numbers()))):
        if found:
            lines += [f"{title}:", *(f"  {_line(one)}" for one in found)]
    return lines


def _rows(done: Replayed) -> str:
    if done.of_rows is not None and done.rows < done.of_rows:
        return f"{done.rows} rows of the {done.of_rows} in the run: the processes that had the others kept nothing"
    return f"{done.rows} rows" + (f", which the run had in {done.parts} parts" if done.parts > 1 else "")


def _line(one: Difference) -> str:
    to_rounding = f"   as in the run, to rounding: {one.apart}" if one.rounded else f"   not as in the run: {one.apart}"
    beside = {None: "", True: "   as in the run, to the last bit", False: to_rounding}
    return f"{one.name:<28} {one.about}{beside[one.equal]}"
