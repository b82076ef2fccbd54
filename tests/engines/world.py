"""A world of real processes in one gloo group, kept alive so that many tests share its start-up.

    parent    run(f, x) ---pipe---> rank 0: f(x)  \
                        ---pipe---> rank 1: f(x)  /  collectives between them
              results  <---pipe---                   each wait ends after a time limit
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

CALL_TIMEOUT_S = 150.0
IMPORTED = [
    "workers.language_model",
    "workers.value_model",
    "workers.engines.training.fsdp",
    "workers.engines.training.deepspeed",
    "workers.engines.generation.vllm",
    "transformers.models.llama",
    "pytest",
]
"""What a rank on a CPU starts with: one process imports them (15 s), and all ranks of all worlds are its forks."""


class World:
    """`size` processes, each a rank of one group on this machine: gloo, or NCCL too where the device is `cuda` (a GPU
    each) or `cuda:0` (that one for all)."""

    def __init__(
        self, size: int, device: str = "cpu", call_timeout_s: float = CALL_TIMEOUT_S, forked: bool = True
    ) -> None:
        """forked: False starts each rank from nothing, as it is with a GPU, which a fork could not use."""
        self._call_timeout_s = call_timeout_s
        context = mp.get_context("forkserver" if forked and device == "cpu" else "spawn")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(IMPORTED)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, port, theirs, device, call_timeout_s), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(*args) on every rank; results by rank. Raises RuntimeError with a rank's traceback."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(self._call_timeout_s):
                raise TimeoutError(f"rank {rank} did not answer within {self._call_timeout_s} s")
            done, result = pipe.recv()
            results.append(result)
            if not done:
                errors.append(f"rank {rank}:\n{result}")
        if errors:
            raise RuntimeError("\n".join(errors))
        return results

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            # They hold nothing worth an orderly exit, which takes gloo and torch seconds.
            process.kill()
            process.join(5)


def _share_one_gpu(rank: int) -> None:
    """NCCL refuses two ranks on one GPU of one host: each says that it is a host of its own, and talks over sockets."""
    os.environ |= {
        "NCCL_HOSTID": f"rank-{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
        "NCCL_IB_DISABLE": "1",
    }


def _serve(rank: int, size: int, port: int, pipe: Connection, device: str, call_timeout_s: float) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from workers.device import device_for, init_distributed
    from workers.network import use_network

    # What is imported is no garbage: a collection (DeepSpeed asks for one with each engine) need not go through it.
    gc.freeze()
    torch.set_num_threads(1)
    if ":" in device:
        _share_one_gpu(rank)
    use_network("127.0.0.1", one_node=True)
    init_distributed(
        rank=rank,
        world=size,
        master_addr="127.0.0.1",
        master_port=port,
        device=torch.device(device) if ":" in device else device_for(rank, device),
        timeout_s=call_timeout_s / 2,
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
