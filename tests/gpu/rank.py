"""What these tests run inside a rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from rlhf_dist.batch import Batch
from rlhf_dist.config import EngineConfig, ModelConfig
from rlhf_dist.reshard.shards import Shards
from rlhf_dist.wire import WorkerContext
from tests.engines.losses import TokenLoss
from tests.engines.test_exact import OPTIMIZER, TEMPERATURE, my_rows
from tests.reshard import rank as reshard_rank
from workers.build_engines import new_training_engine
from workers.reshard import connect


def new_engine(folder: Path, device: str, **settings: Any) -> Any:
    context = WorkerContext(role="actor", rank=dist.get_rank(), world=dist.get_world_size(), device=device, seed=0)
    return new_training_engine(ModelConfig(path=str(folder)), EngineConfig(**settings), OPTIMIZER, "policy", context)


def round_trips(first: int, count: int, link: str) -> list[str]:
    """Random layouts there and back; `cuda...`: over NCCL, though the ranks share a GPU."""
    identity = connect.device_identity
    connect.device_identity = lambda device: f"GPU of rank {dist.get_rank()}"
    try:
        return reshard_rank.round_trips(first, count, link, dist.get_world_size())
    finally:
        connect.device_identity = identity


def backend_of(link: str) -> str:
    """What carries the weights of a link that is open."""
    return type(reshard_rank.link(link)._open().weights).__name__


def slices(folder: Path, device: str) -> tuple[bool, int, list[str]]:
    """Whether the model was read by slices, the boxes compared, and the names of those that are not the files' bits."""
    made = new_engine(folder, device)
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    wrong, boxes, layout = [], 0, made.layout()
    for name, shards in made.local_shards().items():
        for box, shard in zip(layout.parameters[name].boxes_of(dist.get_rank()), shards, strict=True):
            assert shard.device == torch.device(device), f"{name} is on {shard.device}"
            held = stored[name][tuple(slice(*edges) for edges in box)]
            boxes += 1
            if not torch.equal(shard.cpu(), held.float()):
                wrong.append(name)
    return not made._module.read_whole, boxes, wrong


def train(folder: Path, device: str, batches: list[Batch], settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weights after a step on each batch, its rows split over the ranks."""
    made = new_engine(folder, device, **settings)
    for batch in batches:
        made.step(my_rows(batch, "groups in turn"), TokenLoss(), TEMPERATURE)
    return whole(made)


def whole(made: Any) -> dict[str, np.ndarray]:
    return {n: t.cpu().numpy().copy() for bucket in made.full_weights(torch.float32, 1 << 20) for n, t in bucket}


def log_probs(folder: Path, device: str, batch: Batch, settings: dict[str, Any]) -> list[np.ndarray]:
    """[T] of each row; every rank has all rows."""
    column = new_engine(folder, device, **settings).forward(batch, ["log_probs"], TEMPERATURE)["log_probs"]
    return [column.row(k).copy() for k in range(batch.num_rows)]


def away_and_back(folder: Path, device: str, batch: Batch) -> dict[str, Any]:
    """A trained engine leaves the device, and comes back: bits before and after, and bytes on the device meanwhile."""
    made = new_engine(folder, device)
    rows = my_rows(batch, "groups in turn")
    made.step(rows, TokenLoss(), TEMPERATURE)
    parts = made.device_parts()
    before, there = _copied(made.local_shards()), _held(parts, device)
    for part in parts.values():
        part.leave()
    away = _held(parts, device)
    for part in parts.values():
        part.come()
    after, back = _copied(made.local_shards()), _held(parts, device)
    same = all(torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))
    made.step(rows, TokenLoss(), TEMPERATURE)
    moved = any(
        not torch.equal(a, b)
        for name, held_now in _copied(made.local_shards()).items()
        for a, b in zip(before[name], held_now, strict=True)
    )
    held = sum(shard.nbytes for shards in before.values() for shard in shards)
    return {"same": same, "trains on": moved, "left": there - away, "came back": back - away, "held": 3 * held}


def _copied(shards: Shards) -> dict[str, list[torch.Tensor]]:
    return {name: [shard.detach().cpu().clone() for shard in held] for name, held in shards.items()}


def _held(parts: Mapping[str, Any], device: str) -> int:
    """Bytes on the device: torch's count on a GPU, the storages' own on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    return sum(part.held_bytes for part in parts.values())
