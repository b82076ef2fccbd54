"""The cluster this process sees: GPUs by nvidia-smi, else CPU processes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace

from rlhf_dist import machine
from rlhf_dist.hardware import KINDS, Cluster, Gpu
from rlhf_dist.planner.efficiency import Efficiency
from rlhf_dist.typed import ConfigError

CPU_SLOTS = 8
"""Processes at most on a machine without GPUs."""
NAMES = {"A100": "A100-80G", "H100": "H100", "H200": "H200", "B200": "B200", "L40S": "L40S", "MI300X": "MI300X"}
"""Word in the name that nvidia-smi gives -> kind."""
CPU_EFFICIENCY = Efficiency(
    context_bytes=float(1 << 29), graphs_bytes=0.0, decode_step_s=5e-3, decode_sequence_s=2e-4, call_s=0.01
)
"""A process on a CPU has no CUDA context and no graphs."""


def this_machine() -> Cluster:
    """One node: the GPUs this process may use, or processes on its CPUs.

    Raises ConfigError for a GPU whose kind is not known.
    """
    gpus = machine.local_machine().gpus
    return _gpu_node(gpus) if gpus else cpu_node()


def cpu_node() -> Cluster:
    """This machine's CPUs as slots. Orders of magnitude; `rlhf-dist profile` measures them."""
    slots = max(1, min(CPU_SLOTS, os.cpu_count() or 1))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cpu = Gpu(
        name="CPU",
        memory_bytes=memory / slots,
        host_memory_bytes=memory / slots,
        flops=100e9,
        hbm_bytes_per_s=10e9,
        link_bytes_per_s=2e9,
        link_latency_s=1e-4,
        host_bytes_per_s=5e9,
        network_bytes_per_s=1.25e9,
    )
    return Cluster(nodes=1, gpus_per_node=slots, gpu=cpu, network_bytes_per_s=cpu.network_bytes_per_s * slots / 8)


def usual_efficiency(cluster: Cluster) -> Efficiency:
    """Efficiencies where none were measured."""
    return CPU_EFFICIENCY if cluster.gpu.name == "CPU" else Efficiency()


def _gpu_node(gpus: Sequence[machine.Gpu]) -> Cluster:
    name = gpus[0].name
    kind = next((kind for part, kind in NAMES.items() if re.search(rf"\b{part}\b", name.upper())), None)
    if kind is None:
        raise ConfigError(
            f"placement=auto: this machine's GPU {name!r} is none of {', '.join(KINDS)}; set placement.cluster to a "
            f"cluster of a known kind, or plan with a case file that describes it under `gpus`"
        )
    gpu = replace(KINDS[kind], memory_bytes=float(gpus[0].memory_bytes or KINDS[kind].memory_bytes))
    network = gpu.network_bytes_per_s * len(gpus) / 8
    return Cluster(nodes=1, gpus_per_node=len(gpus), gpu=gpu, network_bytes_per_s=network)
