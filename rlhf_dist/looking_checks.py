"""Settings of what a run keeps for people who look inside: they name nodes and steps that it has."""

from __future__ import annotations

from rlhf_dist.compose import Launch
from rlhf_dist.typed import ConfigError, unknown


def check_looking(launch: Launch) -> None:
    """Raises ConfigError for a node that the graph does not have, and a step that the run does not come to: nothing
    would be kept, and nobody would say so."""
    nodes = [node.name for node in launch.dataflow]
    for name in launch.run.output.inputs_nodes:
        if name not in nodes:
            raise ConfigError(f"output.inputs_nodes: {unknown(name, nodes, 'node')}")
    steps = None if launch.run.data.epochs else launch.run.steps  # steps of epochs are counted after the first checks
    for step in launch.run.profile.steps:
        if step < 0 or (steps is not None and step >= steps):
            last = f" to {steps - 1}" if steps is not None else " on"
            raise ConfigError(f"profile.steps must name steps of the run, which are 0{last}, got {step}")
