"""The one place that chooses devices and starts process groups: everything else is given a torch.device.

    Ray assigns  CUDA_VISIBLE_DEVICES of the process   the process's device
    "5"          5          (Ray's default: masked)    cuda:0
    "5"          4,5,6,7    (Ray told not to mask)     cuda:1
    "5"          unset      (the same)                 cuda:5
    "GPU-b"      GPU-a,GPU-b                           cuda:1
    none         any                                   the CPU

Ranks say nothing about it: two pools may share a node, and a pool may begin in the middle of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from workers.network import keys_there, remove_keys, rendezvous

DeviceKind = Literal["auto", "cpu", "cuda"]


def assigned_index(assigned: Sequence[str], visible: str | None) -> int | None:
    """Which of the devices that this process can see is its own; None where it was given none.

    assigned: the ids that Ray's context reports for it: numbers, UUIDs or names of MIG slices, written as in
    `visible`, which is CUDA_VISIBLE_DEVICES, or None where that is not set. Raises ValueError for a device that the
    process cannot see.
    """
    if not assigned:
        return None
    own = assigned[0]
    if visible is None:
        if not own.isdecimal():
            raise ValueError(f"without CUDA_VISIBLE_DEVICES a device's id must be a number, got {own!r} from Ray")
        return int(own)
    names = [name.strip() for name in visible.split(",")]
    if own not in names:
        raise ValueError(
            f"the device that Ray assigned, {own}, must be one of CUDA_VISIBLE_DEVICES={visible}; leave that variable "
            "to Ray: neither ray.worker_env nor a start-up script of the worker may set it"
        )
    return names.index(own)


def device_for(index: int | None, kind: DeviceKind | str = "auto") -> torch.device:
    """The device of one process: `auto` is the GPU it was given, else the CPU.

    `index` counts the GPUs this process can see; None where it was given none.
    Raises ValueError for an unknown kind, a GPU that is not there, or `cuda` without one.
    """
    if kind not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {kind!r}")
    visible = torch.cuda.device_count() if kind != "cpu" and torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and (index is None or not visible)):
        return torch.device("cpu")
    if index is None:
        raise ValueError("device=cuda needs a GPU, and Ray assigned none to this process; set device=auto or cpu")
    if index >= visible:
        raise ValueError(
            f"this process was given GPU {index} of those it can see, and sees {visible}; "
            "ask for fewer slots on this node, or set device=cpu"
        )
    return torch.device("cuda", index)


def sees_its_peers(copies: Sequence[Sequence[int]], indices: Sequence[int]) -> bool:
    """Whether the ranks of every copy of a model can name each other's devices.

    copies: the ranks of each; indices: [world] the index of a rank's device among those its process sees. Ranks of a
    copy whose processes see one device each all call it 0, and none can open another's memory.
    """
    return all(len({indices[rank] for rank in ranks}) == len(ranks) for ranks in copies)


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
    secret: str = "",
) -> None:
    """Join the default process group; every collective in it, this call included, ends within `timeout_s` or raises.

    The interface is the environment's (`use_network`). secret: of the meeting (`new_secret`). Raises RuntimeError if
    this process is already in a group.
    """
    if dist.is_initialized():
        raise RuntimeError("this process has joined a process group already; a process belongs to one worker group")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = rendezvous(master_addr, master_port, hosts=rank == 0, timeout_s=timeout_s, secret=secret)
    dist.init_process_group(
        backend_for(device),
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    if device.type == "cpu":  # gloo has connected all ranks by now; NCCL comes back to the store
        met = keys_there(store) if rank == 0 else []  # before the others may go on and write new ones
        dist.barrier()
        remove_keys(store, met)
