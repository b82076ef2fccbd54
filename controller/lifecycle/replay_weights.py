"""The weights of a replay: those that the node ran with, or a reason why they are not there.

node of step N   the checkpoint after N steps; at step 0 what the settings say
                 then those nodes of step N again that changed its weights before it ran
generation       the checkpoint of the step that its weights were of, where they were older
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from controller.execution.looking import WITHOUT_ROWS
from controller.lifecycle.checkpoint import Checkpoint, list_checkpoints
from rlhf_dist.compose import Launch
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.role_kinds import role_with_base
from rlhf_dist.saved_calls import SavedCall
from rlhf_dist.typed import ConfigError

START = "start"
"""Weights that the run began with."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where the weights of a replay come from."""

    checkpoint: Checkpoint | None
    """None: as the settings give them."""
    about: str
    """For people."""


def weights_of(
    folder: Path,
    launch: Launch,
    nodes: Sequence[Node],
    step: int,
    saved: Mapping[str, Sequence[SavedCall]],
    told: str | None,
) -> Weights:
    learned = sorted(roles_of(launch, nodes).intersection(launch.learning_roles))
    if not learned:
        return Weights(checkpoint=None, about="no weights that the run learned are used")
    whose, there = ", ".join(learned), {one.step: one for one in list_checkpoints(folder / "checkpoints")}
    if told is not None:
        return _told(folder, told, whose, there)
    needed = step
    generated = [call.weights_step for call in saved[nodes[-1].name] if call.weights_step is not None]
    if generated and all(state.endswith(".rollout") for state in nodes[-1].weights_read):
        needed = generated[0] if len(nodes) == 1 else step
    missing = [one.name for one in nodes[:-1] if one.kind not in WITHOUT_ROWS and not saved[one.name]]
    reason = ""
    if missing:
        reason = f"{missing[0]} changed them in step {step} before {nodes[-1].name} ran, and its inputs were not kept"
    elif needed and needed not in there:
        have = ", ".join(f"step_{one}" for one in there) or "no checkpoint"
        reason = f"they are those after {needed} steps, and {folder}/checkpoints has {have}"
    if reason:
        others = "|".join([START, *(f"step_{one}" for one in there)])
        raise ConfigError(
            f"the weights of {whose} at step {step} are not there: {reason}; --weights {others} takes others, and the "
            "numbers will differ (output.checkpoint_every=K with the same K as output.inputs_every keeps both)"
        )
    again = f", then {', '.join(one.name for one in nodes[:-1])} of step {step} again" if nodes[:-1] else ""
    where = f"{there[needed].folder}" if needed else "the run's start, as its settings give them"
    return Weights(checkpoint=there[needed] if needed else None, about=f"{whose} from {where}{again}")


def _told(folder: Path, told: str, whose: str, there: Mapping[int, Checkpoint]) -> Weights:
    if told == START:
        return Weights(
            checkpoint=None, about=f"{whose} from the run's start, as --weights says: the numbers may differ"
        )
    number = told.removeprefix("step_")
    if not number.isdigit() or int(number) not in there:
        have = ", ".join([START, *(f"step_{one}" for one in there)])
        raise ConfigError(f"--weights {told}: {folder}/checkpoints has no such checkpoint; there is {have}")
    one = there[int(number)]
    return Weights(checkpoint=one, about=f"{whose} from {one.folder}, as --weights says: the numbers may differ")


def writers_before(launch: Launch, node: Node, step: int) -> list[Node]:
    """Nodes of the same step that changed the weights `node` uses before it ran, in order."""
    nodes = [one for one in launch.dataflow if one.runs_at(step)]
    chosen: set[str] = set()

    def look(one: Node) -> None:
        used = {state for state in (*one.weights_read, *one.weights_written) if state.split(".")[0] in launch.roles}
        for other in nodes[: nodes.index(one)]:
            if used.intersection(other.weights_written) and other.name not in chosen:
                chosen.add(other.name)
                look(other)

    if node in nodes:
        look(node)
    return [one for one in nodes if one.name in chosen]


def roles_of(launch: Launch, nodes: Sequence[Node]) -> set[str]:
    """Roles whose workers these nodes need."""
    found = {role for one in nodes for role in (one.role, *one.senders) if role in launch.roles}
    return found | {base for role in found if (base := role_with_base(launch, role)) is not None}
