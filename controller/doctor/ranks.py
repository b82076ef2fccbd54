"""Ranks: whether processes come up as a run's do, and reach each other as a run's must."""

from __future__ import annotations

import time

from controller.doctor.finding import Finding, counted, failed, ok, skipped
from controller.doctor.subject import Subject

ROUND = "workers.doctor.ranks:CollectiveRound"
TRANSFER = "workers.doctor.ranks:Transfer"


def processes(subject: Subject) -> Finding:
    """A pool starts, and all its ranks meet in one process group."""
    started = time.perf_counter()
    pool = subject.ranks.start()
    kinds = sorted({device.partition(":")[0] for device in pool.devices})
    found = f"{counted(pool.size, 'rank')} on {counted(len(set(pool.nodes)), 'node')}, on {' and '.join(kinds)}"
    if kinds == ["cpu"] and any(node.gpus for node in subject.nodes):
        return failed(
            f"{found}, though nvidia-smi shows GPUs: torch or Ray sees none",
            "install the CUDA build of torch (make install EXTRA=gpu), and start Ray with --num-gpus",
        )
    return ok(f"{found}, in {time.perf_counter() - started:.1f} s")


def gloo(subject: Subject) -> Finding:
    """Collectives of host memory over all ranks."""
    return ok(subject.ranks.attempt("gloo", ROUND, device="cpu"))


def nccl(subject: Subject) -> Finding:
    """Collectives of device memory over all ranks."""
    if "cpu" in subject.ranks.start().devices:
        return skipped("ranks are on the CPU: there is nothing for NCCL")
    return ok(subject.ranks.attempt("nccl", ROUND, device="cuda"))


def weight_transfer(subject: Subject) -> Finding:
    """Weights from shards of all ranks to the halves that tensor parallelism wants, verified: a sync's own way."""
    return ok(subject.ranks.attempt("weight transfer", TRANSFER))
