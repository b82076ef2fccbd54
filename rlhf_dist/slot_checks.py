"""Pools that ask for more slots than this machine, or a cluster that is described, has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_dist.compose import Launch
from rlhf_dist.machine import local_machine
from rlhf_dist.typed import ConfigError

if TYPE_CHECKING:
    from rlhf_dist.hardware import Cluster

CPU_SLOTS = 8
"""Processes that a machine without GPUs may always have, however few cores it has."""


def check_slots(launch: Launch, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError for pools that this machine has no slots for. sizes: pool -> its slots."""
    if launch.run.ray.address is not None:
        return  # The cluster knows what it has; the controller asks it and waits a bounded time.
    pools = {name: launch.run.placement.pools[name] for name in sizes}
    for name, pool in pools.items():
        if pool.nodes > 1:
            raise ConfigError(
                f"placement.pools.{name}.nodes = {pool.nodes} needs a cluster, and a run without ray.address has this "
                f"machine only; set ray.address, or placement.pools.{name}.nodes=0"
            )
    gpus = len(local_machine().gpus)
    on_gpu = {name: pool for name, pool in pools.items() if pool.device == "cuda" or (pool.device == "auto" and gpus)}
    if on_gpu and not gpus:
        raise ConfigError(
            f"placement.pools.{next(iter(on_gpu))}.device is cuda, but this machine has no GPU; "
            f"set it to auto or cpu, or ray.address to a cluster that has one"
        )
    limits = (("GPUs", on_gpu, gpus), ("processes", pools.keys() - on_gpu.keys(), max(CPU_SLOTS, os.cpu_count() or 1)))
    for what, names, limit in limits:
        wanted = sum(sizes[name] for name in names)
        if wanted > limit:
            each = ", ".join(f"{name} {sizes[name]}" for name in names)
            raise ConfigError(
                f"placement.pools need {wanted} slots ({each}), but this machine offers {limit} {what}; "
                f"use fewer slots, place roles together, or set ray.address to a larger cluster"
            )


def check_cluster(launch: Launch, sizes: Mapping[str, int], cluster: Cluster) -> None:
    """The same for a cluster that is described and not there."""
    pools = launch.run.placement.pools
    for name, size in sizes.items():
        nodes = pools[name].nodes or 1
        if nodes > cluster.nodes or size // nodes > cluster.gpus_per_node * (1 if pools[name].nodes else cluster.nodes):
            raise ConfigError(
                f"placement.pools.{name} needs {size} slots" + (f" on {nodes} nodes" if nodes > 1 else "") + ", and "
                f"{cluster.text} has {cluster.nodes} nodes of {cluster.gpus_per_node}"
            )
    if sum(sizes.values()) > cluster.gpus:
        each = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"placement.pools need {sum(sizes.values())} slots ({each}), and {cluster.text} has {cluster.gpus}"
        )
