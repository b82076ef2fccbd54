"""A short profile of a machine for the planner: matmuls, memory, copies, and collectives between its devices.

    matmul [8192 x 8192]        -> efficiency.matmul (a CPU: gpu.flops, since it has no datasheet)
    copy within memory          -> efficiency.hbm_weights (CPU: gpu.hbm_bytes_per_s)
    pinned copy to the host     -> efficiency.host_link
    all-gather between devices  -> efficiency.link (CPU: gpu.link_bytes_per_s, gloo)

Medians of several timings. On a Ray cluster every node measures itself, and the slowest counts.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any

from rlhf_dist.hardware import Cluster
from rlhf_dist.planner.calibration import SHARES, calibration_text
from rlhf_dist.planner.efficiency import Efficiency
from rlhf_dist.planner.machine import this_machine, usual_efficiency

REPEATS = 7
LINK_BYTES = 64 << 20
READY_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Profile:
    """What was measured."""

    cluster: str
    efficiency: dict[str, float]
    gpu: dict[str, float]
    host: str

    @property
    def text(self) -> str:
        """The calibration file."""
        usual = Efficiency()
        changed = replace(usual, **self.efficiency)
        date = time.strftime("%Y-%m-%d")
        return calibration_text(changed, f"rlhf-dist profile of {self.cluster} on {self.host}, {date}", self.gpu)


def profile_machine() -> Profile:
    """Measure this machine; about 20 s."""
    cluster = this_machine()
    measured = _on_gpu(cluster) if cluster.gpu.name != "CPU" else _on_cpu(cluster)
    return Profile(cluster.text, *measured, socket.gethostname())


def profile_cluster(address: str) -> Profile:
    """Measure every node of a Ray cluster at the same time; the slowest number of each kind counts.

    Raises ConfigError if the cluster cannot be reached or a node does not answer in time.
    """
    import ray

    from rlhf_dist.typed import ConfigError

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--address {address}: cannot reach a Ray cluster there: {error}") from error
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        refs = []
        for node in nodes:
            strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            gpus = node["Resources"].get("GPU", 0.0)
            task = ray.remote(profile_machine).options(num_cpus=1, num_gpus=gpus, scheduling_strategy=strategy)
            refs.append(task.remote())
        done, waiting = ray.wait(refs, num_returns=len(refs), timeout=READY_TIMEOUT_S)
        if waiting:
            raise ConfigError(
                f"--address {address}: {len(waiting)} of {len(refs)} nodes did not measure within "
                f"{READY_TIMEOUT_S:g} s; free their GPUs and CPUs first"
            )
        found: list[Profile] = ray.get(done)
    finally:
        ray.shutdown()
    return slowest(found)


def slowest(profiles: list[Profile]) -> Profile:
    """One profile for several nodes: the least of each rate and share."""
    first = profiles[0]

    def least(dicts: list[dict[str, float]]) -> dict[str, float]:
        return {name: min(one[name] for one in dicts if name in one) for name in dicts[0]}

    return Profile(
        f"{len(profiles)} nodes of {first.cluster}",
        least([one.efficiency for one in profiles]),
        least([one.gpu for one in profiles]),
        ", ".join(one.host for one in profiles),
    )


# --- devices -------------------------------------------------------------------------------------------------
def _on_cpu(cluster: Cluster) -> tuple[dict[str, float], dict[str, float]]:
    """A process has one thread here; its rates stand in place of a datasheet's, so efficiencies are 1."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        size = 1024
        a, b = torch.randn(size, size), torch.randn(size, size)
        flops = 2.0 * size**3 / _seconds(lambda: a @ b)
        block = torch.zeros(16 << 20)
        target = torch.empty_like(block)
        copied = 2.0 * block.numel() * 4 / _seconds(lambda: target.copy_(block))
    finally:
        torch.set_num_threads(threads)
    link = _link_bytes_per_s(2, "gloo")
    usual = usual_efficiency(cluster)
    efficiency = {"matmul": 1.0, "hbm_weights": 1.0, "hbm_kv": 1.0, "link": 1.0, "host_link": 1.0}
    # What a CPU process does not have stays as it is usual for one.
    for item in fields(Efficiency):
        if item.name not in SHARES and getattr(usual, item.name) != getattr(Efficiency(), item.name):
            efficiency[item.name] = getattr(usual, item.name)
    return efficiency, {"flops": flops, "hbm_bytes_per_s": copied, "link_bytes_per_s": link, "host_bytes_per_s": copied}


def _on_gpu(cluster: Cluster) -> tuple[dict[str, float], dict[str, float]]:
    import torch

    gpu, device = cluster.gpu, torch.device("cuda")
    size = 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    block = torch.zeros(256 << 20, device=device)
    target, pinned = torch.empty_like(block), torch.empty(64 << 20, pin_memory=True)
    matmul = 2.0 * size**3 / _seconds(lambda: a @ a, torch.cuda.synchronize) / gpu.flops
    copied = 2.0 * block.numel() * 4 / _seconds(lambda: target.copy_(block), torch.cuda.synchronize)
    to_host = (
        pinned.numel()
        * 4
        / _seconds(lambda: pinned.copy_(block[: pinned.numel()], non_blocking=True), torch.cuda.synchronize)
    )
    usual = Efficiency()
    efficiency = {
        # A layer's matmuls are smaller and have norms and attention between them: large ones overstate it.
        "matmul": min(1.0, matmul) * gpu.matmul_efficiency / LARGE_MATMUL,
        "hbm_weights": min(1.0, copied / gpu.hbm_bytes_per_s),
        "hbm_kv": min(1.0, copied / gpu.hbm_bytes_per_s) * usual.hbm_kv / usual.hbm_weights,
        "host_link": min(1.0, to_host / gpu.host_bytes_per_s),
    }
    if torch.cuda.device_count() > 1:
        link = _link_bytes_per_s(torch.cuda.device_count(), "nccl")
        efficiency["link"] = min(1.0, link / gpu.link_bytes_per_s)
    return efficiency, {}


LARGE_MATMUL = 0.75
"""Share of FLOP/s that an 8192 x 8192 x 8192 bf16 matmul usually reaches (cuBLAS on A100 and H100: 70-80 %)."""


def _nothing() -> None:
    """A CPU works when it is asked to."""


def _seconds(work: Callable[[], Any], wait: Callable[[], Any] = _nothing) -> float:
    """Median seconds of `work`, warmed up."""
    for _ in range(2):
        work()
    wait()
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - started)
    return median(found)


def _link_bytes_per_s(ranks: int, backend: str) -> float:
    """Bytes per second of a ring all-gather, as seen by one rank."""
    import torch.multiprocessing as processes

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = processes.get_context("spawn")
    answers = context.SimpleQueue()
    started = [context.Process(target=_gather, args=(rank, ranks, port, backend, answers)) for rank in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(READY_TIMEOUT_S)
    stuck = [process for process in started if process.is_alive()]
    for process in stuck:
        process.kill()
        process.join()
    failed = [process.exitcode for process in started if process.exitcode]
    if stuck or failed:
        raise RuntimeError(f"the all-gather between {ranks} processes ({backend}) failed: exit codes {failed}")
    return float(answers.get())


def _gather(rank: int, ranks: int, port: int, backend: str, answers: Any) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=READY_TIMEOUT_S / 2),
    )
    mine = torch.zeros(LINK_BYTES // 4 // ranks, device=device)
    whole = [torch.empty_like(mine) for _ in range(ranks)]
    wait: Callable[[], Any] = torch.cuda.synchronize if backend == "nccl" else _nothing
    seconds = _seconds(lambda: dist.all_gather(whole, mine), wait)
    if rank == 0:
        answers.put(LINK_BYTES * (ranks - 1) / ranks / seconds)
    dist.barrier()
    dist.destroy_process_group()
