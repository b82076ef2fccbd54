"""A worker of ranks that wait for each other for ever."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from rlhf_dist.wire import WorkerContext


class Hangs:
    """Rank 0 inside a collective, the others beside it."""

    remarks = ()

    def __init__(self, context: WorkerContext) -> None:
        if context.rank:
            time.sleep(600)
        dist.all_reduce(torch.ones(1))
