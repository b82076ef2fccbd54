"""Opens the connections of a link, the same on every device: gloo for words, and one more group for weights.

    host memory                gloo carries both
    a GPU for each rank        NCCL carries the weights, gloo the words
    a GPU for several ranks    gloo carries both, through host memory: NCCL has no two ranks on one device

What is called on them is the same: `alltoall_base` for rounds of weights, small collectives for words. Nothing that
NCCL would match by order of posting, and gloo by tag, is used.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ABORT_S = 0.5
WATCHDOG_TIMES = 2.0
WATCHDOG_MORE_S = 60.0
"""NCCL's watchdog ends the whole process when a collective is late. It gets so much more time than a sync has that the
link's own deadline, which is an error and no end, always comes first."""


@dataclass
class Connections:
    """Between all ranks of a link."""

    words: Any
    """Small collectives of host memory."""
    weights: Any
    """Rounds of chunks."""
    device: torch.device
    """Where the chunks lie."""

    def abort(self) -> None:
        """Drop them, whatever is under way; at most ABORT_S of it is waited for.

        A gloo group with an operation under way goes only when that one's time is over, and blocks whoever lets go of
        it last: so that is a thread of its own, and nothing else holds on to the groups.
        """
        groups = [self.words, self.weights]
        self.words = self.weights = None
        thread = threading.Thread(target=_abort, args=(groups,), name="weight sync abort", daemon=True)
        thread.start()
        thread.join(ABORT_S)


def open_connections(
    store: dist.Store, rank: int, world: int, device: torch.device, host: str | None, timeout_s: float
) -> Connections:
    """Connects all ranks; `device` is where their chunks lie. Raises RuntimeError where one does not come in time."""
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, world, _gloo_options(host, timeout_s))
    if device.type != "cuda":
        return Connections(gloo, gloo, device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=WATCHDOG_TIMES * timeout_s + WATCHDOG_MORE_S)
    nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, world, options)
    return Connections(gloo, nccl, device)


def _abort(groups: list[Any]) -> None:
    for group in groups:
        group.abort()
    del group
    groups.clear()


def device_identity(device: torch.device) -> str:
    """Equal for processes on one GPU; empty on a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def machine_identity() -> str:
    """Equal for processes that can open each other's memory files."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}/{os.getuid()}"


def one_device_each(devices: Sequence[str]) -> bool:
    """Whether no two ranks are on one GPU; true on CPUs."""
    named = [device for device in devices if device]
    return len(set(named)) == len(named)


def _gloo_options(host: str | None, timeout_s: float) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s)
    create, interface = dist.ProcessGroupGloo.create_device, os.environ.get("GLOO_SOCKET_IFNAME")
    if host:
        options._devices = [create(hostname=host)]
    elif interface:
        options._devices = [create(interface=interface)]
    else:
        options._devices = [dist.ProcessGroupGloo.create_default_device()]
    return options
