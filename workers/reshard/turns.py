"""Carries out `rlhf_dist.reshard.memory`: a training and a generation engine take turns on one device.

    training engine used ──> turn("train")       generation asleep, parameters and optimizer back
    reshard              ──> turn("sync")        optimizer to the host, generation weights awake
    generate             ──> turn("generate")    parameters to the host, KV cache awake

On a CPU nothing moves, and the same calls are made in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from rlhf_dist.reshard.memory import GENERATION, TRAINING, Kind, PhaseName, moves, predicted_bytes
from workers.engines.generation import GenerationEngine, SleepPart
from workers.engines.training import OffloadPart, TrainingEngine


class Turns:
    """Whose turn it is. Every rank takes the same turns."""

    def __init__(
        self, engine: TrainingEngine, rollout: GenerationEngine, device: torch.device, sizes: Mapping[Kind, int]
    ) -> None:
        """Both engines have everything on the device. From now on using the training engine gives it its turn."""
        self._engine, self._rollout, self._device = engine, rollout, device
        self.predicted = predicted_bytes(sizes)
        self.phase: PhaseName | None = None
        self.peak_bytes: dict[PhaseName, int] = {}
        """Phase -> most bytes allocated through torch in the last turn of it; CUDA only."""
        engine.before_use = lambda: self.turn("train")

    def turn(self, phase: PhaseName) -> None:
        """Bring the device into a phase; nothing where it is in it already."""
        if phase == self.phase:
            return
        self._measure()
        step = moves(self.phase, phase)
        if away := _training(step.leave):
            self._engine.offload(away)
        if asleep := _generation(step.leave):
            self._rollout.sleep(asleep)
        if back := _training(step.come):
            self._engine.onload(back)
        if awake := _generation(step.come):
            self._rollout.wake(awake)
        self.phase = phase

    def _measure(self) -> None:
        if self._device.type != "cuda":
            return
        if self.phase is not None:
            self.peak_bytes[self.phase] = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)


def sizes_on_device(engine: TrainingEngine, rank: int, weights: int, buckets: int, cache: int) -> Mapping[Kind, int]:
    """Bytes of each kind on this rank, activations left out: they depend on the batch.

    weights: bytes of the generation model; buckets: budget of a sync; cache: bytes of the KV cache.
    """
    parameters = int(engine.layout("base").bytes_per_rank()[rank])
    trained = int(engine.layout("adapters").bytes_per_rank()[rank]) if engine.adapters else parameters
    held = parameters + (trained if engine.adapters else 0)
    # AdamW: two float32 moments for each float32 master, and a gradient inside a step.
    return {
        "parameters": held,
        "gradients": trained,
        "optimizer": 2 * trained,
        "weights": weights,
        "buckets": buckets,
        "cache": cache,
    }


def _training(kinds: tuple[Kind, ...]) -> list[OffloadPart]:
    return [cast(OffloadPart, kind) for kind in kinds if kind in TRAINING]


def _generation(kinds: tuple[Kind, ...]) -> list[SleepPart]:
    return [cast(SleepPart, kind) for kind in kinds if kind in GENERATION]
