"""What settings that are left to the machine become on it: one function each, its value and the words why.

    setting                     a CPU                                  a GPU
    model.dtype=auto            bfloat16 where it has instructions     bfloat16 from compute capability 8.0
                                for it, else float32
    pools.NAME.slots=0          two processes, or one on one core      all GPUs
    rollout.kv_cache_bytes      64 MiB                                 what the share leaves beside the weights
    rollout.gpu_memory_share                                           half beside a trainer, 0.85 alone
    rollout.bucket_bytes        64 MiB                                 1 GiB

    attention of a pack         a fused call a row length              one flash kernel, in bfloat16

Several pools without a number of slots divide what there is. `auto_settings.py` puts these into a launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf_dist.config import PoolConfig
from rlhf_dist.machine import BFLOAT16_FLAGS, Machine
from rlhf_dist.reshard.rounds import default_bucket_bytes

Device = Literal["cpu", "cuda"]
CPU_SLOTS = 2
"""Processes of a pool on a machine without GPUs: each holds a whole copy of what is gathered, and shares the cores."""
CPU_CACHE_BYTES = 64 << 20
SHARED_GPU, OWN_GPU = 0.5, 0.85
"""Share of a GPU's memory for generation beside a trainer, and alone: the rest is for buckets, graphs and CUDA."""
BFLOAT16_CAPABILITY = (8, 0)
"""NVIDIA's first compute capability with bfloat16."""


@dataclass(frozen=True)
class Choice:
    """What a setting became."""

    keys: tuple[str, ...]
    """The settings, dotted."""
    value: Any
    why: str
    departs: bool = False
    """It is not what most machines for this work would get, so the start of a run says it."""

    @property
    def line(self) -> str:
        """For people: `dtype float32 (actor.engine, actor.rollout): why`."""
        name = self.keys[0].rsplit(".", 1)[1]
        where = ", ".join(key.rsplit(".", 1)[0].removeprefix("placement.pools.") for key in self.keys)
        return f"{name} {_size(name, self.value)} ({where}): {self.why}"


def device_of(pool: PoolConfig, machine: Machine) -> Device:
    """What the processes of a pool compute on."""
    if pool.device == "auto":
        return "cuda" if machine.gpus else "cpu"
    return "cuda" if pool.device == "cuda" else "cpu"


def dtype_on(machine: Machine, device: Device) -> Choice:
    """The dtype that a device is fast in."""
    if device == "cuda":
        old = [gpu for gpu in machine.gpus if gpu.capability is not None and gpu.capability < BFLOAT16_CAPABILITY]
        if old:
            has = ".".join(map(str, old[0].capability or ()))
            return _choice(
                "float32", f"{old[0].name} has no bfloat16: compute capability {has}, it came with 8.0", True
            )
        return _choice("bfloat16", "GPUs compute fastest in it; master weights and sums stay float32")
    processor = machine.processor
    if processor is None or not processor.flags:
        return _choice("float32", "nobody says whether the processors have bfloat16 instructions", True)
    if processor.bfloat16:
        return _choice("bfloat16", f"this processor has instructions for it ({processor.bfloat16[0]})")
    wanted = " or ".join(BFLOAT16_FLAGS.get(processor.family, ()))
    lacks = f" ({wanted})" if wanted else ""
    return _choice("float32", f"this processor has no bfloat16 instructions{lacks} and would emulate them slowly", True)


def slots_on(machine: Machine, device: Device, pools: int, taken: int, on_each_node: bool) -> Choice:
    """Slots of each of `pools` pools that say no number, where other pools take `taken` slots."""
    others = f", divided among {pools} pools" if pools > 1 else ""
    if device == "cuda":
        there = len(machine.gpus) // (machine.nodes if on_each_node else 1)
        rest = f" that other pools leave of {there}" if taken else ""
        what = "a GPU" if there - taken == 1 else f"the {max(there - taken, 0)} GPUs"
        on = f" on each node of {machine.text}" if on_each_node else f" of {machine.text}"
        return _choice(max(1, (there - taken) // pools), f"{what}{rest or on}{others}", there == 1)
    cores = 1 if machine.processor is None else machine.processor.cores
    why = (
        f"one core for it on {machine.text}"
        if cores == 1
        else f"processes on the {cores} cores of {machine.text}{others}"
    )
    return _choice(max(1, min(CPU_SLOTS, cores) // pools), why, cores == 1)


def kv_cache_on(device: Device) -> Choice:
    """Bytes of keys and values on each rank; 0: what vLLM finds within its share."""
    if device == "cuda":
        return _choice(0, "what rollout.gpu_memory_share leaves beside the weights")
    return _choice(CPU_CACHE_BYTES, "on a CPU")


def gpu_share(beside: bool, generators: int) -> Choice:
    """Share of a GPU's memory for each of `generators` roles that generate in a pool. beside: of other models."""
    share = SHARED_GPU if beside else OWN_GPU
    why = "half, beside the other models of the pool" if beside else "generation has the pool for itself"
    more = f", divided among {generators} roles that generate" if generators > 1 else ""
    return _choice(int(100 * share / generators) / 100, why + more)


def bucket_on(device: Device) -> Choice:
    """Bytes of weights on their way at one time."""
    why = "few large messages, as fast links want" if device == "cuda" else "a CPU's memory is the host's"
    return _choice(default_bucket_bytes(device), why)


def takes_packs(device: str, dtype: str) -> bool:
    """Whether torch's variable-length flash kernel takes a whole pack at once. dtype: torch's name of it."""
    return device == "cuda" and dtype in ("bfloat16", "float16")


def attention_on(device: Device, dtype: str) -> Choice:
    """How the trainer attends to a pack."""
    if takes_packs(device, dtype):
        return _choice("flash", "torch's variable-length kernel takes a whole pack at once")
    wants = "a GPU" if device == "cpu" else "bfloat16"
    return _choice("fused", f"a call for the rows of each length; the variable-length kernel wants {wants}")


def emulated(machine: Machine, device: Device, dtype: str) -> str | None:
    """Why a dtype that was set by hand is slow on a device; None where it is not."""
    best = dtype_on(machine, device)
    slow = dtype == "bfloat16" and best.value == "float32" and (device == "cuda" or machine.processor is not None)
    return best.why if slow else None


def _choice(value: Any, why: str, departs: bool = False) -> Choice:
    return Choice((), value, why, departs)


def _size(name: str, value: Any) -> str:
    if not name.endswith("_bytes") or not value:
        return str(value)
    return f"{value >> 30} GiB" if value % (1 << 30) == 0 else f"{value >> 20} MiB"
