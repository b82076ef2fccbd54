"""Whole tensors from shards of any layout, one bounded bucket at a time.

A bucket is one collective: each rank lays its boxes of several parameters one after the other, padded to the
largest rank's size, and every rank receives all of them. A box that several ranks hold is sent by the first.

    rank 0   | a rows 0-3 | b rows 0-1 |
    rank 1   | a rows 4-6 . b row 2    . |      padded to the size of rank 0's shard
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_dist.reshard.layout import Layout, ParameterLayout
from rlhf_dist.reshard.shards import Shards


def full_tensors(
    layout: Layout,
    shards: Shards,
    dtype: torch.dtype,
    bucket_bytes: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> Iterator[list[tuple[str, Tensor]]]:
    """The tensors of `layout`, whole on every rank, cast to `dtype` before they travel. Collective.

    Buckets hold at most `bucket_bytes` of full tensors, or a single tensor above it; while one is made, the
    received buffer exists besides it. Raises ValueError for a bucket size below 1.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be >= 1, got {bucket_bytes}; it is bytes of full tensors at one time")
    bucket: list[str] = []
    size = 0
    for name, parameter in layout.parameters.items():
        new = int(np.prod(parameter.shape, dtype=np.int64)) * dtype.itemsize
        if bucket and size + new > bucket_bytes:
            yield _gather(bucket, layout, shards, dtype, group, device)
            bucket, size = [], 0
        bucket.append(name)
        size += new
    if bucket:
        yield _gather(bucket, layout, shards, dtype, group, device)


def _gather(
    bucket: list[str],
    layout: Layout,
    shards: Shards,
    dtype: torch.dtype,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[tuple[str, Tensor]]:
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    parameters = {name: layout.parameters[name] for name in bucket}
    sent = np.zeros(world, np.int64)
    for parameter in parameters.values():
        first, _ = parameter.distinct
        np.add.at(sent, parameter.rank[first], parameter.volume[first])
    mine = torch.zeros(int(sent.max()), dtype=dtype, device=device)
    at = 0
    for name, parameter in parameters.items():
        senders = set(parameter.distinct[0].tolist())
        for box, shard in zip(np.flatnonzero(parameter.rank == rank), shards[name], strict=True):
            if int(box) in senders:
                mine[at : at + shard.numel()].view(shard.shape).copy_(shard)
                at += shard.numel()
    received = mine.new_empty(world * len(mine))
    dist.all_gather_into_tensor(received, mine, group=group)
    return _assemble(parameters, received.view(world, -1))


def _assemble(parameters: dict[str, ParameterLayout], received: Tensor) -> list[tuple[str, Tensor]]:
    at = np.zeros(len(received), np.int64)
    tensors = []
    for name, parameter in parameters.items():
        whole = received.new_empty(parameter.shape)
        for box in np.sort(parameter.distinct[0]):
            holder, count = int(parameter.rank[box]), int(parameter.volume[box])
            place = tuple(slice(start, stop) for start, stop in parameter.box(int(box)))
            whole[place] = received[holder, at[holder] : at[holder] + count].view(whole[place].shape)
            at[holder] += count
        tensors.append((name, whole))
    return tensors
