"""What there is to know of a node without starting anything on it; runs there, as a Ray actor. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from rlhf_dist.machine import local_machine

SHARED_MEMORY = Path("/dev/shm")
_SOURCES = ("rlhf_dist", "workers", "controller", "recipes")
_NVIDIA_SMI_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """As its driver describes it."""

    name: str
    memory_bytes: int
    driver: str


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """One node. Sizes are bytes."""

    name: str
    """Its address, told apart where two raylets share it."""
    address: str
    """By which Ray knows it."""
    python: str
    packages: Mapping[str, str]
    """Distribution -> version, those that are installed of the ones asked for."""
    sources: str
    """Digest of rlhf-dist's own files."""
    gpus: tuple[Gpu, ...]
    cores: int
    cpu_flags: frozenset[str]
    interfaces: Mapping[str, tuple[str, ...]]
    """Those that are up -> their addresses."""
    host_name: str
    host_addresses: tuple[str, ...]
    """What the host name resolves to; empty where it does not."""
    gloo_interface: str | None
    """GLOO_SOCKET_IFNAME."""
    shm_total: int
    shm_free: int
    run_folder_free: int
    """On the disk of the folder of runs."""
    ray_temp: str
    ray_temp_free: int
    memory_total: int
    memory_available: int
    memory_limit: int | None
    """Of the control group; None: none."""
    open_files: int
    """Soft limit of a process."""
    open_files_most: int
    """Hard limit: what a user may raise it to."""


class NodeProbe:
    """Answers for its node."""

    def facts(self, name: str, address: str, packages: Sequence[str], run_folder: str, ray_temp: str) -> NodeFacts:
        """See NodeFacts; packages: distributions to look for."""
        shm = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
        memory = psutil.virtual_memory()
        files = resource.getrlimit(resource.RLIMIT_NOFILE)
        host = socket.gethostname()
        return NodeFacts(
            name=name,
            address=address,
            python=platform.python_version(),
            packages=_versions(packages),
            sources=_digest_of_sources(),
            gpus=_gpus(),
            cores=os.cpu_count() or 1,
            cpu_flags=_cpu_flags(),
            interfaces=_interfaces(),
            host_name=host,
            host_addresses=_addresses(host),
            gloo_interface=os.environ.get("GLOO_SOCKET_IFNAME"),
            shm_total=shm.total if shm else 0,
            shm_free=shm.free if shm else 0,
            run_folder_free=_free(Path(run_folder)),
            ray_temp=ray_temp,
            ray_temp_free=_free(Path(ray_temp)),
            memory_total=memory.total,
            memory_available=memory.available,
            memory_limit=_memory_limit(),
            open_files=files[0],
            open_files_most=files[1],
        )

    def now(self) -> float:
        """Its clock, seconds since 1970."""
        return time.time()

    def size(self, data: Any) -> int:
        """Bytes of an array that came through the object store."""
        return int(data.nbytes)

    def read_and_write(self, folder: str, name: str, own: str) -> str:
        """The text of a file in a folder; writes one of its own beside it."""
        text = (Path(folder) / name).read_text()
        (Path(folder) / own).write_text(text)
        return text


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _digest_of_sources() -> str:
    """Of the files that run here: what is installed, or what PYTHONPATH has."""
    import rlhf_dist

    root, digest = Path(rlhf_dist.__file__).parents[1], hashlib.sha256()
    for path in sorted(path for package in _SOURCES for path in (root / package).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _gpus() -> tuple[Gpu, ...]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[part.strip() for part in line.split(",")] for line in asked.stdout.splitlines() if line.count(",") == 2]
    # Parts of a GPU and unified memory have no size of their own: "[N/A]".
    return tuple(
        Gpu(name=name, memory_bytes=int(size) << 20 if size.isdecimal() else 0, driver=driver)
        for name, size, driver in rows
    )


def _cpu_flags() -> frozenset[str]:
    processor = local_machine().processor
    return processor.flags if processor is not None else frozenset()


def _interfaces() -> dict[str, tuple[str, ...]]:
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: tuple(one.address.partition("%")[0] for one in addresses if one.family in families)
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
    }


def _addresses(name: str) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(name, None)))
    except OSError:
        return ()


def _free(folder: Path) -> int:
    """Free bytes where `folder` is, or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def _memory_limit() -> int | None:
    """The least of the limits of this process's control group and those around it."""
    limits = []
    with contextlib.suppress(OSError):
        groups = {part[1]: part[2] for line in Path("/proc/self/cgroup").read_text().splitlines()
                  if len(part := line.split(":", 2)) == 3}  # fmt: skip
        for root, file, path in (
            (Path("/sys/fs/cgroup"), "memory.max", groups.get("", "/")),
            (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", groups.get("memory", "/")),
        ):
            own = root / path.lstrip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(root):
                    with contextlib.suppress(OSError, ValueError):
                        limits.append(int((folder / file).read_text()))
    least = min(limits, default=0)
    # Without a limit, version 1 of control groups says a number larger than any machine.
    return least if 0 < least < psutil.virtual_memory().total else None
