"""From a framework's tensors to layouts and shards: what a training engine's `layout()` and `local_shards()` need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rlhf_dist.reshard.layout import Layout, ParameterLayout, flat_range_boxes

Shards = Mapping[str, Sequence[Tensor]]
"""Per parameter this rank's tensors: one per box of the layout, in its order and of its shape; may be none."""


def dtype_name(tensor: Tensor) -> str:
    """`float32` for torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")


def dtensor_layout(parameters: Mapping[str, DTensor], grid: DeviceMesh) -> Layout:
    """The layout of DTensors (FSDP2, with tensor parallelism or without); ranks as in `grid`, the mesh of all axes.

    A parameter may live on some axes of the grid only: along the others it is copied.
    """
    return Layout(grid.size(), {name: _dtensor_boxes(parameter, grid) for name, parameter in parameters.items()})


def dtensor_shards(parameters: Mapping[str, DTensor]) -> dict[str, list[Tensor]]:
    """This rank's shards of the layout of DTensors: views, without padding."""
    local = {name: parameter.to_local().detach() for name, parameter in parameters.items()}
    return {name: [shard] if shard.numel() else [] for name, shard in local.items()}


def flat_shards(flat: Tensor, shape: Sequence[int], begin: int, end: int) -> list[Tensor]:
    """Views of a ZeRO partition as the boxes of `from_flat_ranges([(rank, begin, end)])`.

    flat: [end - begin] elements [begin, end) of the flattened parameter, possibly with padding behind.
    """
    shards, at = [], 0
    for box in flat_range_boxes(shape, begin, end):
        sizes = [stop - start for start, stop in box]
        shards.append(flat[at : at + prod(sizes)].view(sizes))
        at += prod(sizes)
    return shards


def _dtensor_boxes(parameter: DTensor, grid: DeviceMesh) -> ParameterLayout:
    axes, own = grid.mesh_dim_names or (), parameter.device_mesh.mesh_dim_names or ()
    placement_of = dict(zip(own, parameter.placements, strict=True))
    placements: list[int | None] = []
    late: list[int] = []
    for axis, name in enumerate(axes):
        placement = placement_of.get(name)
        if placement is not None and placement.is_partial():
            raise ValueError(f"a parameter's placement must be a shard or a copy, got {placement}")
        copied = placement is None or placement.is_replicate()
        placements.append(None if copied else int(placement.dim))  # type: ignore[union-attr]
        # FSDP cuts what tensor parallelism has cut although its axis stands first: such an axis is strided.
        if getattr(placement, "split_factor", 1) > 1:
            late.append(axis)
    order = [axis for axis in range(len(placements)) if axis not in late] + late[::-1]
    mesh = grid.mesh.cpu().numpy().astype(np.int64)
    return ParameterLayout.from_mesh(tuple(parameter.shape), dtype_name(parameter), mesh, placements, order)
