"""Whether what is to go on beside other nodes can: evaluation (`output.evaluate_beside`), `placement.pieces`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_dist.dataflow.beside import draws_with_them
from rlhf_dist.dataflow.pieces import takes_pieces
from rlhf_dist.held_out import evaluation_graphs
from rlhf_dist.placement.roles import rollout_of
from rlhf_dist.typed import ConfigError

if TYPE_CHECKING:
    from rlhf_dist.compose import Launch

PIECES = "placement.pieces"
KEY = "output.evaluate_beside"


def check_evaluation(launch: Launch, pools: Mapping[str, str]) -> None:
    """Raise ConfigError where an evaluation would hold up what it is beside, or be of other weights than the step began
    with. pools: role, or ROLE.rollout -> pool."""
    run, dataflow = launch.run, launch.dataflow
    if not run.output.evaluate_beside or run.data.heldout is None:
        return
    if not run.output.evaluate_every:
        raise ConfigError(
            f"{KEY} is about evaluations while steps run, and output.evaluate_every=0 has none; set it to the steps "
            f"between two, or {KEY}=false"
        )
    if run.placement.max_staleness:
        raise ConfigError(
            f"{KEY} takes the time in which a pool that generates waits for new weights, and with "
            f"placement.max_staleness={run.placement.max_staleness} it does not wait; set {KEY}=false, or "
            "placement.max_staleness=0"
        )
    for one in evaluation_graphs(launch.recipe, dataflow, launch.algorithm, every=run.output.evaluate_every):
        training = {pools[role] for role, facts in dataflow.facts.items() if facts.trained}
        for role in one.dataflow.generating:
            if (pool := pools.get(rollout_of(role), pools[role])) in training:
                raise ConfigError(
                    f"{KEY} needs a pool that generates while others train, and {role!r} generates in pool {pool!r}, "
                    "which trains; set placement.rollout, or the role's pool, to another one "
                    f"(placement.pools.rollout.slots=1 placement.rollout=rollout), or {KEY}=false"
                )
            if not draws_with_them(dataflow.nodes, one):
                raise ConfigError(
                    f"{KEY}: {one.name} comes behind what a step generates with the weights that it began with, and "
                    f"in {dataflow.name} {role!r} generates nothing before these, or those of what scores it, change; "
                    f"set {KEY}=false"
                )


def check_pieces(launch: Launch, pools: Mapping[str, str]) -> None:
    """Raise ConfigError where rows are to be taken piece by piece and nothing in the recipe does, in these pools."""
    count = launch.run.placement.pieces
    if count == 1:
        return
    if _takers(launch, pools):
        return
    raise ConfigError(
        f"{PIECES}={count} lets rules, and models of other pools, take responses and episodes (without groups=) while "
        f"others are still made, and in {launch.dataflow.name} none does; give such a role a pool of its own "
        f"(placement.roles.ROLE=POOL), or set {PIECES}=1"
    )


def beside_lines(launch: Launch, pools: Mapping[str, str]) -> list[str]:
    """What goes on beside other nodes, for people."""
    run, lines = launch.run, list[str]()
    if run.placement.pieces > 1:
        for source, takers in _takers(launch, pools).items():
            lines.append(f"pieces    {', '.join(takers)}: in {run.placement.pieces} of {source}, as they are finished")
    if run.data.heldout is not None and run.output.evaluate_every:
        how = "beside what trains" if run.output.evaluate_beside else "between two steps"
        lines.append(f"held out  evaluated every {run.output.evaluate_every} steps, {how}")
    return lines


def _takers(launch: Launch, pools: Mapping[str, str]) -> dict[str, list[str]]:
    """Node -> those that take its rows piece by piece, in these pools."""
    nodes, found = list(launch.dataflow), dict[str, list[str]]()
    for source in nodes:
        made_in = pools.get(rollout_of(source.role), pools.get(source.role))
        for target in nodes:
            if takes_pieces(source, target) and pools.get(target.role) != made_in:
                found.setdefault(source.name, []).append(target.name)
    return found
