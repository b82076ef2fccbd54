"""A round of collectives over all ranks, and weights on the way that a sync takes."""

from __future__ import annotations

import os
import time
from math import prod
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_dist.reshard.groups import Cut, parallel_layout, rollout_axes, rollout_grid
from rlhf_dist.reshard.layout import Box, Layout, ParameterLayout
from rlhf_dist.reshard.rounds import default_bucket_bytes
from rlhf_dist.reshard.routes import make_routes
from rlhf_dist.wire import WorkerContext
from workers.reshard.link import Link
from workers.reshard.sync import WeightSync

_ELEMENTS = 1 << 20
_CUTS = {"rows": Cut((4096, 1024), 0), "columns": Cut((1024, 4096), 1), "whole": Cut((1024,), None)}
"""As tensor parallelism cuts a linear layer, the next one, and a norm: 17 MB in bfloat16."""


class CollectiveRound:
    """An all-reduce, an all-gather and an all-to-all; what arrives is compared with what must."""

    def __init__(self, context: WorkerContext, device: str) -> None:
        """device: `cpu` for gloo, `cuda` for NCCL. Raises RuntimeError where something else arrives."""
        where = torch.device("cpu" if device == "cpu" else context.device)
        rank, world = context.rank, context.world
        summed = torch.full((_ELEMENTS,), rank + 1.0, device=where)
        dist.all_reduce(summed)  # connects, too
        self._check("all-reduce", summed, torch.full_like(summed, world * (world + 1) / 2))
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(torch.zeros_like(summed))
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        seconds = time.perf_counter() - started
        ranks = torch.arange(world, device=where)
        gathered = list(torch.empty_like(ranks).split(1))
        dist.all_gather(gathered, ranks[rank : rank + 1].clone())
        self._check("all-gather", torch.cat(gathered), ranks)
        swapped = torch.empty_like(ranks)
        dist.all_to_all_single(swapped, world * ranks + rank)
        self._check("all-to-all", swapped, world * rank + ranks)
        by = os.environ.get(f"{'NCCL' if where.type == 'cuda' else 'GLOO'}_SOCKET_IFNAME", "").lstrip("=")
        rate = summed.nbytes / seconds / 1e9
        self.remarks = (
            f"{world} ranks agree{f' over {by}' if by else ''}; all-reduce of {summed.nbytes >> 20} MiB in "
            f"{seconds * 1e3:.1f} ms ({rate:.2f} GB/s)",
        )

    @staticmethod
    def _check(what: str, found: Tensor, wanted: Tensor) -> None:
        if not torch.equal(found, wanted):
            raise RuntimeError(f"{what} gave {found[:4].tolist()}..., it must give {wanted[:4].tolist()}...")


class Transfer:
    """Three tensors, each cut over all ranks, to the cuts of tensor parallelism: planned, moved and verified."""

    def __init__(self, context: WorkerContext) -> None:
        """Raises SyncFailed or SyncStopped, as a weight sync does, and RuntimeError for a wrong element."""
        rank, world, device = context.rank, context.world, torch.device(context.device)
        grid = rollout_grid(rollout_axes(world, 2 if world % 2 == 0 else 1))[:, None, :]
        target = parallel_layout(_CUTS, grid, "bfloat16")
        ranks = np.arange(world)
        source = Layout(
            world, {name: ParameterLayout.from_mesh(cut.shape, "bfloat16", ranks, [0]) for name, cut in _CUTS.items()}
        )
        full = {name: _values(cut.shape).to(device) for name, cut in _CUTS.items()}
        mine, wanted = _shards(full, source, rank), _shards(full, target, rank)
        arrived = {name: [torch.full_like(shard, torch.nan) for shard in held] for name, held in wanted.items()}
        link = _link(context, device) if world > 1 else None
        if link is not None:
            link.meet()
        sync = WeightSync(make_routes(source, target), rank, default_bucket_bytes(device.type), link)
        report = sync.run(1, mine, arrived)
        for name, shards in wanted.items():
            if not all(torch.equal(a, b) for a, b in zip(arrived[name], shards, strict=True)):
                raise RuntimeError(f"weights of {name!r} are verified and differ from what was sent: report this")
        seconds = report.phase_seconds["exchange"]
        self.remarks = (
            f"{report.parameters} tensors verified; {report.bytes_received / 1e6:.1f} MB to rank 0 in "
            f"{seconds * 1e3:.0f} ms",
        )


def _link(context: WorkerContext, device: torch.device) -> Link:
    name = [uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    store = dist.distributed_c10d._get_default_store()
    return Link(store, name[0], context.rank, context.world, device, context.sync_timeout_s)


def _values(shape: tuple[int, ...]) -> Tensor:
    """No two neighbours alike, exact in bfloat16."""
    return (torch.arange(prod(shape)) % 251).reshape(shape).bfloat16()


def _shards(full: dict[str, Tensor], layout: Layout, rank: int) -> dict[str, list[Tensor]]:
    def cut(tensor: Tensor, box: Box) -> Tensor:
        return tensor[tuple(slice(*edges) for edges in box)].clone()

    return {name: [cut(full[name], box) for box in p.boxes_of(rank)] for name, p in layout.parameters.items()}
