"""The ranks of one training engine, as a grid of named axes.

    rank = ((replica * shards + shard) * tp + t)         parameters: sharded over `shard`, copied over `replicate`
    rank = ((dp * sp + s) * tp + t)                      rows: split over `dp`, repeated over `sp` and `tp`

Both views number the ranks alike: `sp` neighbours lie inside one shard axis, so a gradient summed over the shard
axis is summed over the sequence pieces too.

Example: 8 ranks, replicas=2, sequence_parallel=2, tensor_parallel=1

    rank        0  1  2  3  4  5  6  7
    replicate   0  0  0  0  1  1  1  1
    shard       0  1  2  3  0  1  2  3
    dp          0  0  1  1  2  2  3  3
    sp          0  1  0  1  0  1  0  1
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from rlhf_dist.config import EngineConfig
from workers.engines.model.token_split import WHOLE, TokenSplit


@dataclass(frozen=True)
class TrainingMesh:
    """Process groups and sub-meshes of an engine's axes."""

    grid: DeviceMesh
    """All axes of the parameters: [shard] or [replicate, shard, tp]."""
    parameters: DeviceMesh
    """[shard] or [replicate, shard]: what `fully_shard` is given."""
    tensor: DeviceMesh | None
    """[tp]; None without tensor parallelism."""
    rows: dist.ProcessGroup
    """Ranks that hold different rows and the same piece of them: counts of rows and tokens add up here."""
    world: dist.ProcessGroup
    """All ranks of the engine."""
    tokens: TokenSplit
    """How the tokens of one pack are cut over sp and tp."""
    device: torch.device

    @property
    def rows_rank(self) -> int:
        """Which share of the rows this rank has."""
        return dist.get_rank(self.rows)

    def copies(self, parameter: Tensor) -> int:
        """Ranks that hold the same piece of `parameter` as this one."""
        assert isinstance(parameter, DTensor), "an engine's parameters are sharded"
        return dist.get_world_size(self.world) // prod(
            size
            for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True)
            if not placement.is_replicate()  # what FSDP cuts after DTensor is no Shard but a strided one
        )


def training_mesh(config: EngineConfig, device: torch.device) -> TrainingMesh:
    """The mesh `config` asks for over the default process group; engines that ask for the same share it. Collective.

    Raises ValueError for axes that do not divide the ranks.
    """
    everyone = dist.group.WORLD
    assert everyone is not None, "the default process group is up"
    return _mesh(everyone, config.sequence_parallel, config.tensor_parallel, config.replicas, device)


def forget_meshes() -> None:
    """Let go of all groups: the default one is being destroyed. What holds on to one keeps its threads and sockets."""
    _mesh.cache_clear()
    _clear_sharding_prop_cache()


@cache
def _mesh(everyone: dist.ProcessGroup, sp: int, tp: int, replicas: int, device: torch.device) -> TrainingMesh:
    # Made once: a gloo group is a thread that wakes up a hundred times a second for as long as the process lives.
    world = everyone.size()
    if world % (sp * tp) or (world // (sp * tp)) % replicas:
        raise ValueError(
            f"sequence_parallel * tensor_parallel * replicas must divide the {world} ranks, "
            f"got {sp} * {tp} * {replicas}"
        )
    shards = world // (replicas * tp)
    if tp == 1 and replicas == 1:
        grid = parameters = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        tensor = None
    else:
        grid = init_device_mesh(device.type, (replicas, shards, tp), mesh_dim_names=("replicate", "shard", "tp"))
        parameters = grid["replicate", "shard"] if replicas > 1 else grid["shard"]
        tensor = grid["tp"] if tp > 1 else None
    if sp * tp == 1:
        return TrainingMesh(grid, parameters, tensor, everyone, everyone, WHOLE, device)
    view = init_device_mesh(device.type, (world // (sp * tp), sp, tp), mesh_dim_names=("dp", "sp", "pieces"))
    split = TokenSplit(
        sequence=sp,
        tensor=tp,
        rank=view.get_local_rank("sp") * tp + view.get_local_rank("pieces"),
        sequence_group=view.get_group("sp") if sp > 1 else None,
        tensor_group=view.get_group("pieces") if tp > 1 else None,
        group=view["sp", "pieces"]._flatten("tokens").get_group(),
    )
    return TrainingMesh(grid, parameters, tensor, view.get_group("dp"), everyone, split, device)
