"""What a Ray cluster that a run has joined consists of, for settings that are left to the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf_dist.auto_settings import settle
from rlhf_dist.checks import check_launch
from rlhf_dist.compose import Launch
from rlhf_dist.machine import Gpu, Machine, local_machine

ACCELERATOR = "accelerator_type:"
"""How Ray names the kind of a node's accelerators among its resources."""
BEFORE_BFLOAT16 = {"K80": (3, 7), "P100": (6, 0), "P4": (6, 1), "V100": (7, 0), "T4": (7, 5)}
"""Kinds of Ray with a compute capability before 8.0."""


def machine_of_nodes(nodes: Sequence[Mapping[str, Any]], host_processes: int) -> Machine:
    """The cluster of these nodes, as `ray.nodes()` gives them. Where it has no GPU its processors are taken to be like
    this machine's, which is one of its nodes; `host_processes` of its CPUs are spoken for."""
    alive = [dict(node["Resources"]) for node in nodes if node["Alive"]]
    gpus: list[Gpu] = []
    for resources in alive:
        kind = next((name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)), "GPU")
        gpus += [Gpu(name=kind, memory_bytes=0, capability=BEFORE_BFLOAT16.get(kind))] * int(resources.get("GPU", 0))
    cores = int(sum(resources.get("CPU", 0) for resources in alive)) - host_processes
    processor = local_machine().processor
    return Machine(
        text=f"the cluster of {len(alive)} nodes" if len(alive) > 1 else "the cluster of one node",
        processor=None if processor is None else replace(processor, cores=max(1, cores)),
        gpus=tuple(gpus),
        nodes=max(1, sum(resources.get("GPU", 0) > 0 for resources in alive)),
    )


def settled_on_cluster(launch: Launch, note: Callable[[str], None]) -> Launch:
    """The launch for the cluster that was joined; `note` hears what is not as it was before.

    Raises ConfigError where the launch cannot be on it.
    """
    import ray

    there = settle(launch, machine_of_nodes(ray.nodes(), launch.run.placement.host_processes))
    if (there.run, there.roles) == (launch.run, launch.roles):
        return there
    check_launch(there)
    for choice in there.choices:
        if choice not in launch.choices:
            note(f"on {there.machine.text if there.machine else 'the cluster'}: {choice.line}")
    return there
