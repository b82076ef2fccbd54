"""Whether what is evaluated can be so beside the steps (`output.evaluate_beside`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_dist.dataflow.beside import draws_with_them
from rlhf_dist.held_out import evaluation_graphs
from rlhf_dist.placement.roles import rollout_of
from rlhf_dist.typed import ConfigError

if TYPE_CHECKING:
    from rlhf_dist.compose import Launch

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
        for role in (role for role in one.dataflow.generating if dataflow.facts[role].trained):
            if rollout_of(role) not in pools:
                raise ConfigError(
                    f"{KEY} needs a pool that generates while others train, and {role!r} generates in its training "
                    f"pool {pools[role]!r}; set placement.rollout to another pool (placement.pools.rollout.slots=1 "
                    f"placement.rollout=rollout), or {KEY}=false"
                )
            if not draws_with_them(dataflow.nodes, one):
                raise ConfigError(
                    f"{KEY}: {one.name} comes behind what a step generates with the weights that it began with, and "
                    f"{role!r} generates nothing with these in {dataflow.name}; set {KEY}=false"
                )
