"""The one place that chooses devices and starts process groups: everything else is given a torch.device."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

DeviceKind = Literal["auto", "cpu", "cuda"]


def device_for(local_rank: int, kind: DeviceKind | str = "auto") -> torch.device:
    """The device of one process: `auto` is CUDA where there is a GPU, else the CPU.

    `local_rank` counts the GPUs this process can see (0 where the launcher shows it only its own).
    Raises ValueError for an unknown kind, a GPU that is not there, or `cuda` on a machine without one.
    """
    if kind not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {kind!r}")
    visible = torch.cuda.device_count() if kind != "cpu" and torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and not visible):
        return torch.device("cpu")
    if local_rank >= visible:
        raise ValueError(
            f"local rank {local_rank} needs a GPU of its own and this process sees {visible}; "
            "ask for fewer slots on this node, or set device=cpu"
        )
    return torch.device("cuda", local_rank)


def backend_for(device: torch.device) -> str:
    """The torch.distributed backend: gloo for CPU tensors, NCCL for CUDA ones (both in a CUDA process)."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def init_distributed(
    *,
    rank: int,
    world: int,
    master_addr: str,
    master_port: int,
    device: torch.device,
    timeout_s: float,
    one_node: bool = False,
) -> None:
    """Join the default process group; every collective in it, this call included, ends within `timeout_s` or raises.

    `one_node` says that all ranks run on this machine: gloo then talks over the loopback interface, which needs
    no resolvable host name. Raises RuntimeError if this process is already in a group.
    """
    if dist.is_initialized():
        raise RuntimeError("this process has joined a process group already; a process belongs to one worker group")
    if one_node:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend_for(device),
        init_method=f"tcp://{master_addr}:{master_port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
