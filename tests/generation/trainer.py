"""What the tests run inside a rank that trains: a real engine, and its end of a weight sync."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import EngineConfig, LoraConfig, ModelConfig, OptimizerConfig, RolloutConfig
from rlhf_dist.wire import Bridge, WorkerContext
from tests.engines.losses import TokenLoss, make_batch
from tests.generation import rank
from tests.generation.test_engines import SAMPLING
from workers.build_engines import new_training_engine
from workers.memory.arbiter import Arbiter
from workers.reshard.canary import CanaryDied
from workers.reshard.colocated import ColocatedSync
from workers.reshard.link import SyncStopped
from workers.reshard.separate import GenerationEnd, TrainingEnd
from workers.reshard.sync import SyncFailed

CPU = torch.device("cpu")
ROLLOUT = RolloutConfig(bucket_bytes=1 << 20, canary_tolerance=1e-3)
TEMPERATURE = SAMPLING.temperature
LORA = LoraConfig(rank=4, alpha=8.0)

_trainer: Any = None
_sync: Any = None
_memory: Any = None


def open_trainer(folder: Path, settings: dict[str, Any], device: str = "cpu") -> None:
    """A training engine over all ranks of this world."""
    global _trainer
    context = _context(device)
    _trainer = new_training_engine(
        ModelConfig(path=str(folder)), EngineConfig(**settings), OptimizerConfig(lr=1e-2), "policy", context
    )


def _context(device: str) -> WorkerContext:
    return WorkerContext(role="actor", rank=dist.get_rank(), world=dist.get_world_size(), device=device, seed=0)


def close_trainer() -> None:
    """From now on these ranks only generate."""
    global _trainer
    _trainer = None


def step() -> None:
    """One optimizer step; every rank gives the same rows, which is a batch of them twice where rows are split."""
    _trainer.step(make_batch(), TokenLoss())


def colocate(device: str = "cpu", order: tuple[str, ...] | None = None) -> str | None:
    """This rank's end beside the generation engine of `rank.open_engine`; returns why it sends whole tensors.

    order: of phases, where the device holds the largest of them and no more; None: no limit.
    """
    global _sync, _memory
    rank._engine.wake()
    _memory = Arbiter(torch.device(device), None if order is None else 1 << 40, order or ())
    _memory.add_training("actor", _trainer, trained=True)
    _sync = ColocatedSync(_trainer, rank._engine, ROLLOUT, replace(_context(device), memory=_memory))
    if order is not None:
        _memory.ledger.budget = max(map(_memory.ledger.predicted_bytes, _memory.ledger.phases))
        _memory._working["actor.update"] = 1 << 40  # seen to need all that is left
    return _sync.fallback  # type: ignore[no-any-return]


def connect(port: int, senders: int, receivers: int, timeout_s: float, traces: bool = True) -> None:
    """This rank's end of a bridge: the training one where a trainer is open."""
    global _sync
    bridge = Bridge(address="127.0.0.1", port=port, senders=senders, receivers=receivers, timeout_s=timeout_s)
    if _trainer is not None:
        _sync = TrainingEnd(_trainer, ROLLOUT, bridge, dist.get_rank(), CPU)
        return
    if not traces:
        from workers.engines.generation.interface import Untraceable

        def refuse(shapes: Any) -> Any:
            raise Untraceable("this test wants whole tensors")

        rank._engine.trace = refuse
    _sync = GenerationEnd(rank._engine, ROLLOUT, bridge, dist.get_rank(), CPU)


def trace_again() -> None:
    """Undo `connect(traces=False)`."""
    rank._engine.__dict__.pop("trace", None)


def run(must_change: bool, late: int = -1) -> dict[str, Any]:
    """One sync; the rank `late` (of this world) comes when the others have given up."""
    if dist.get_rank() == late:
        time.sleep(6.0)
    try:
        report = _sync.run() if isinstance(_sync, GenerationEnd) else _sync.run(must_change)
    except (SyncFailed, SyncStopped, CanaryDied) as error:
        return {"error": type(error).__name__, "says": str(error)}
    return {"version": report.version, "bytes": report.bytes_received, "fallback": _sync.fallback}


def planned_bytes() -> int:
    return int(_sync.pieces.planned_bytes)


def take_turns(prompts: list[list[int]], seeds: list[int]) -> dict[str, Any]:
    """Generation before and after the trainer has been used, and in its turn again."""
    _sync.run(False)
    _memory.turn("actor.generate")
    first = rank.generate(prompts, SAMPLING, seeds)
    _memory.report()
    step()
    held = _memory.held_bytes()
    asleep, dropped = rank.generate(prompts, SAMPLING, seeds), _sync.dropped
    if dropped:
        _sync.run(True)
    _memory.turn("actor.generate")
    again, moved = rank.generate(prompts, SAMPLING, seeds), _memory.report()
    return {
        "first": first,
        "asleep": asleep,
        "again": again,
        "dropped": dropped,
        "held": held,
        "predicted": _memory.ledger.predicted_bytes("actor.update") - _trainer.gradient_bytes,
        "moved": int(moved["moved_bytes_update"].value),
        "sizes": {f"{tenant} {kind}": size for (tenant, kind), size in _memory.ledger.sizes.items()},
    }


def adapter_bytes() -> int:
    return sum(int(np.prod(p.shape)) * 4 for p in _trainer.layout("adapters").parameters.values())


def trainer_difference(prompts: list[list[int]], answers: rank.Answers, n: int, base: bool = False) -> float:
    """Largest |log-prob generated - the trainer's|."""
    rows = {
        "prompt_ids": Column.ragged([np.array(p, np.int32) for p in prompts for _ in range(n)], dtype=np.int32),
        "response_ids": Column.ragged([np.array(tokens, np.int32) for tokens, _, _ in answers], dtype=np.int32),
    }
    column = _trainer.forward(Batch(rows, len(answers)), ["log_probs"], TEMPERATURE, base=base)["log_probs"]
    return max(float(np.abs(column.row(k) - np.array(answers[k][1])).max()) for k in range(len(answers)))
