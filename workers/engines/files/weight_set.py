"""Named sets of an engine's weights: copies of what a checkpoint would hold, in this rank's host memory.

Kept as the tensors of a checkpoint's state (DTensors, flat ranges), so that a checkpoint writes and reads them as it
does the weights themselves, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

from workers.engines.files.checkpoint import State, flat_tensor

MODEL = "model."
"""What keys of weights begin with in a state; the others are the optimizer's."""


@dataclass(frozen=True)
class WeightSet:
    """What was saved under one name."""

    version: int
    """Optimizer steps done by then."""
    optimizer: bool
    tensors: State

    def of_checkpoint(self, name: str) -> State:
        """Its tensors under the names that they have in a checkpoint."""
        return {f"{name}/{key}": tensor for key, tensor in self.tensors.items()}


def room_for(state: State, *, optimizer: bool, version: int) -> WeightSet:
    """A set for what is in `state` (its weights alone, without `optimizer`), with nothing in it yet."""
    kept = {key: _on_host(tensor) for key, tensor in state.items() if optimizer or key.startswith(MODEL)}
    return WeightSet(version, optimizer, kept)


@torch.no_grad()
def copy_state(source: State, target: State) -> None:
    """Copy every tensor of `target` from that of `source`, this rank's part."""
    for key, tensor in target.items():
        for mine, theirs in zip(local_parts(tensor), local_parts(source[key]), strict=True):
            mine.copy_(theirs)


def sets_of_card(told: Mapping[str, Mapping[str, Any]], state: State) -> dict[str, WeightSet]:
    """Room for the sets that a checkpoint's card names."""
    return {
        name: room_for(state, optimizer=bool(one["optimizer"]), version=int(one["version"]))
        for name, one in told.items()
    }


def local_parts(tensor: Any) -> Iterator[Tensor]:
    """This rank's parts of a tensor of a state, by reference."""
    if isinstance(tensor, ShardedTensor):
        yield from (shard.tensor for shard in tensor.local_shards())
    else:
        yield tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _on_host(tensor: Any) -> Any:
    if isinstance(tensor, ShardedTensor):
        held: list[tuple[Any, int, int]] = [
            (one.placement.rank(), one.shard_offsets[0], one.shard_offsets[0] + one.shard_sizes[0])  # type: ignore[union-attr]
            for one in tensor.metadata().shards_metadata
        ]
        parts = [shard.tensor for shard in tensor.local_shards()]
        local = torch.empty_like(parts[0], device="cpu") if parts else torch.empty(0, dtype=tensor.dtype)
        return flat_tensor(local, held, dist.get_rank())
    if isinstance(tensor, DTensor):
        # The constructor, as FSDP calls it: `from_local` would move the host's memory to the mesh's device.
        return DTensor(torch.empty_like(tensor.to_local(), device="cpu"), tensor._spec, requires_grad=False)
    return torch.empty_like(tensor, device="cpu")
