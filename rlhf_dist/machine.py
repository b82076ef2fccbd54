"""What a launch runs on: a processor and its instructions, GPUs, memory. Asked of the system, nothing is imported.

/proc/cpuinfo ──> Processor ─┐
nvidia-smi ─────> Gpu, ... ──┼─> Machine ──> machine_settings.py
--cluster 4x8xH100 ──────────┘
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_dist.hardware import Cluster

BFLOAT16_FLAGS = {"x86": ("amx_bf16", "avx512_bf16"), "arm": ("bf16", "svebf16")}
"""Family of processors -> flags of /proc/cpuinfo that mean products of bfloat16 in one instruction."""
SMI_WAIT_S = 10.0
"""Longest wait for nvidia-smi, which may hang on a broken driver."""


@dataclass(frozen=True, kw_only=True)
class Processor:
    """The processor of a machine."""

    name: str
    family: str
    """`x86`, `arm` or the system's own word for another."""
    cores: int
    """That this process may use."""
    flags: frozenset[str]
    """Instructions that all cores have, as Linux calls them; empty where the system does not say."""

    @property
    def bfloat16(self) -> tuple[str, ...]:
        """Its flags for products of bfloat16."""
        return tuple(flag for flag in BFLOAT16_FLAGS.get(self.family, ()) if flag in self.flags)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU."""

    name: str
    memory_bytes: int
    """0 where the driver does not say: the GPU shares the host's memory."""
    capability: tuple[int, int] | None = None
    """NVIDIA's compute capability; None where it is not known."""
    uuid: str = ""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a launch runs: this machine, or a cluster."""

    text: str
    """What it is called in a sentence."""
    processor: Processor | None
    """None where nobody said."""
    gpus: tuple[Gpu, ...]
    """Those this process may use, or of all nodes."""
    nodes: int = 1

    @property
    def line(self) -> str:
        """What it has, for people."""
        found = []
        if self.gpus:
            one = self.gpus[0]
            memory = f", {one.memory_bytes / (1 << 30):.1f} GiB each" if one.memory_bytes else ""
            found.append(f"{len(self.gpus)} x {one.name}{memory}")
        if self.processor is not None:
            found.append(f"{self.processor.name}, {_count(self.processor.cores, 'core')}")
        return f"{self.text}: {'; '.join(found) or 'nothing is known of it'}"


def local_machine() -> Machine:
    """The machine of this process."""
    return Machine(
        text="this machine", processor=_processor(), gpus=visible(_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    )


def described_machine(cluster: Cluster) -> Machine:
    """A cluster in the planner's notation. Its GPUs are of kinds that all have bfloat16."""
    gpu = Gpu(name=cluster.gpu.name, memory_bytes=int(cluster.gpu.memory_bytes))
    gpus = () if gpu.name == "CPU" else (gpu,) * cluster.gpus
    return Machine(text=cluster.text, processor=None, gpus=gpus, nodes=cluster.nodes)


def read_processor(cpuinfo: str, architecture: str, cores: int) -> Processor:
    """The processor that a /proc/cpuinfo describes; `architecture` is what `uname -m` says.

    Cores may differ (big and little ones): a flag counts that all of them have.
    """
    word = architecture.lower()
    family = "x86" if word in ("x86_64", "amd64", "i686") else "arm" if word in ("aarch64", "arm64") else word
    name, flags = "", list[frozenset[str]]()
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags.append(frozenset(value.split()))
        elif key.strip() == "model name" and not name:
            name = " ".join(value.split())
    return Processor(
        name=name or f"a processor ({architecture or 'unknown'})",
        family=family,
        cores=cores,
        flags=frozenset.intersection(*flags) if flags else frozenset(),
    )


def read_gpus(listed: str) -> tuple[Gpu, ...]:
    """GPUs from lines of `nvidia-smi --query-gpu=uuid,memory.total,compute_cap,name`, memory in MiB.

    Lines of another form are left out: a GPU that the driver has lost is not one.
    """
    found = []
    for line in listed.splitlines():
        with suppress(ValueError):
            uuid, memory, capability, name = (part.strip() for part in line.split(",", 3))
            major, _, minor = capability.partition(".")
            known = (int(major), int(minor)) if minor.isdecimal() else None
            size = int(memory) << 20 if memory.isdecimal() else 0
            found.append(Gpu(name=name, memory_bytes=size, capability=known, uuid=uuid))
    return tuple(found)


def visible(gpus: Sequence[Gpu], devices: str | None) -> tuple[Gpu, ...]:
    """The GPUs that CUDA shows where CUDA_VISIBLE_DEVICES is `devices`: indices or ids, up to the first wrong one."""
    if devices is None:
        return tuple(gpus)
    found: list[Gpu] = []
    for entry in (part.strip() for part in devices.split(",")):
        if entry.isdecimal():
            match = list(gpus[int(entry) : int(entry) + 1])
        else:
            # An instance of MIG has no line of its own: it is a part of some GPU.
            match = [gpu for gpu in gpus if entry and gpu.uuid.startswith(entry) or entry.startswith("MIG-")]
        if not match:
            break
        found.append(match[0])
    return tuple(found)


@cache
def _processor() -> Processor:
    cpuinfo = ""
    with suppress(OSError):
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return read_processor(cpuinfo, platform.machine(), cores)


@cache
def _gpus() -> tuple[Gpu, ...]:
    query = ["nvidia-smi", "--query-gpu=uuid,memory.total,compute_cap,name", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=SMI_WAIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return read_gpus(listed.stdout) if listed.returncode == 0 else ()


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
