"""Whole tensors from shards, one bounded bucket at a time.

A bucket is one collective: each rank lays its rows of several parameters one after the other, padded to
equal size, and every rank receives all of them.

    rank 0   | a rows 0-3 | b rows 0-1 |
    rank 1   | a rows 4-6 . b row 2    . |      padded to the size of rank 0's shard
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def full_tensors(
    shards: Mapping[str, DTensor], dtype: torch.dtype, bucket_bytes: int, group: dist.ProcessGroup
) -> Iterator[list[tuple[str, Tensor]]]:
    """Tensors sharded on dim 0, whole on every rank, cast to `dtype` before they travel. Collective.

    Buckets hold at most `bucket_bytes` of full tensors, or a single tensor above it; while one is made, the
    received buffer exists besides it. Raises ValueError for a bucket size below 1.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be >= 1, got {bucket_bytes}; it is bytes of full tensors at one time")
    bucket: dict[str, DTensor] = {}
    size = 0
    for name, shard in shards.items():
        new = shard.numel() * dtype.itemsize
        if bucket and size + new > bucket_bytes:
            yield _gather(bucket, dtype, group)
            bucket, size = {}, 0
        bucket[name] = shard
        size += new
    if bucket:
        yield _gather(bucket, dtype, group)


def _gather(bucket: Mapping[str, DTensor], dtype: torch.dtype, group: dist.ProcessGroup) -> list[tuple[str, Tensor]]:
    world = dist.get_world_size(group)
    # As torch.chunk cuts: equal shards of ceil(rows / world), the last ones shorter or empty.
    padded = [-(-shard.shape[0] // world) * shard.shape[1:].numel() for shard in bucket.values()]
    first = next(iter(bucket.values())).to_local()
    mine = torch.zeros(sum(padded), dtype=dtype, device=first.device)
    for part, shard in zip(torch.split(mine, padded), bucket.values(), strict=True):
        local = shard.to_local().detach().reshape(-1)
        part[: len(local)].copy_(local)
    received = mine.new_empty(world * len(mine))
    dist.all_gather_into_tensor(received, mine, group=group)
    tensors = []
    for part, (name, shard) in zip(torch.split(received.view(world, -1), padded, dim=1), bucket.items(), strict=True):
        tensors.append((name, part.reshape(-1)[: shard.numel()].view(shard.shape)))
    return tensors
