"""What `test_two_worlds` runs inside ranks of two gloo worlds that know nothing of each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig, RolloutConfig
from rlhf_dist.reshard.checksum import full_checksum
from rlhf_dist.wire import Meeting, WorkerContext
from tests.engines.losses import TokenLoss, make_batch
from workers.engines.build import new_generation_engine, new_training_engine
from workers.engines.generation import Untraceable
from workers.engines.training import TrainingEngine
from workers.engines.transformers import TransformersEngine
from workers.reshard.apart import Receiver, Sender

ROLLOUT = RolloutConfig(engine="transformers", dtype="bfloat16", bucket_bytes=20_000)
SENDERS, RECEIVERS = 2, 3
_held: dict[str, Any] = {}


def _context(timeout_s: float) -> WorkerContext:
    rank, world = dist.get_rank(), dist.get_world_size()
    return WorkerContext(role="actor", rank=rank, world=world, device="cpu", seed=0, sync_timeout_s=timeout_s)


def _meeting(port: int, first: int) -> Meeting:
    nodes = (0,) * (SENDERS + RECEIVERS)
    return Meeting(address="127.0.0.1", port=port, rank=first + dist.get_rank(), senders=SENDERS, nodes=nodes)


def connect_sender(folder: Path, port: int, timeout_s: float) -> None:
    """A trainer; the same one in later calls."""
    if "engine" not in _held:
        optimizer = OptimizerConfig(lr=1e-2)
        model = ModelConfig(path=str(folder))
        _held["engine"] = new_training_engine(model, EngineConfig(), optimizer, "policy", _context(timeout_s))
    _held["sender"] = Sender(_held["engine"], ROLLOUT, _context(timeout_s), _meeting(port, 0))


def send(train: bool, must_change: bool) -> dict[str, Any]:
    """A step if asked, and a sync; checksums of what was to be sent."""
    engine: TrainingEngine = _held["engine"]
    if train:
        engine.step(make_batch(), TokenLoss())
    try:
        _held["sender"].run(must_change)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"version": engine.version, "checksums": engine.checksums(torch.bfloat16)}


def connect_receiver(folder: Path, port: int, timeout_s: float, traces: bool) -> None:
    """A generation engine, `traces` False: as if its loader could not be traced on the last rank."""
    context = _context(timeout_s)
    made = new_generation_engine(str(folder), ROLLOUT, context, [[rank] for rank in range(RECEIVERS)])
    assert isinstance(made, TransformersEngine)
    if not traces and context.rank == RECEIVERS - 1:

        def refuse(shapes: Any) -> Any:
            raise Untraceable("this test wants whole tensors")

        made.trace = refuse  # type: ignore[method-assign]
    _held["rollout"] = made
    _held["receiver"] = Receiver(made, ROLLOUT, context, _meeting(port, SENDERS))


def receive() -> dict[str, Any]:
    """A sync; the version and checksums of what is there now."""
    made = _held["rollout"]
    try:
        report = _held["receiver"].run()
    except RuntimeError as error:
        return {"error": str(error), "version": made.weights_version}
    model = dict(made._model.named_parameters())
    return {
        "version": made.weights_version,
        "received": report.bytes_received,
        "checksums": {name: full_checksum(parameter) for name, parameter in model.items()},
    }
