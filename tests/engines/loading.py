"""How much memory a rank takes to start an engine, for the test of it and for `make bench-load`."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.engines.test_exact import new_engine
from workers.engines.files import load
from workers.engines.files.slices import ReadWhole
from workers.engines.training.deepspeed import DeepSpeedEngine, _flat_masters
from workers.engines.training.packed_engine import PackedEngine

WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8192}
"""42 M parameters, 168 MB in float32; the largest tensor 16.8 MB."""


@dataclass(frozen=True)
class Peak:
    """Bytes on one rank."""

    shard_bytes: int
    """Its part of the weights: parameters as they lie between passes, and master weights where these are others."""
    held_bytes: int
    """Private memory of the host in the end, beside what there was: some engines make gradients and moments at once."""
    largest_tensor_bytes: int
    peak_extra_bytes: int
    """Most private memory of the host beside what there was. Pages of the files, which ranks of a node share and the
    kernel may drop, are not the process's own."""
    peak_extra_device_bytes: int | None
    """Most on the GPU beside what there was; None without one."""

    @property
    def bound(self) -> int:
        """Two shards and the largest tensor."""
        return 2 * self.shard_bytes + self.largest_tensor_bytes


def peak_of_building(
    folder: Path, engine: dict[str, Any], trained: bool = False, whole: bool = False, device: str = "cpu"
) -> Peak:
    """Until the weights are there: the passes that an engine makes to find its way need what passes need.

    whole: have the library load the model, as before models were read by slices.
    """
    # What an earlier engine freed must be asked of the system again, or it would not be seen.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    cuda = device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        there = torch.cuda.memory_allocated()
    with _watched() as most, _read_whole(whole):
        at = f"cuda:{torch.cuda.current_device()}" if cuda else device
        made = new_engine(folder, trained=trained, device=at, **engine)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _weights(made)}
    return Peak(
        shard_bytes=sum(storages.values()),
        held_bytes=most[-1],
        largest_tensor_bytes=max(int(np.prod(p.shape)) * 4 for p in made.layout().parameters.values()),
        peak_extra_bytes=max(most),
        peak_extra_device_bytes=torch.cuda.max_memory_allocated() - there if cuda else None,
    )


def _weights(engine: Any) -> Iterator[Tensor]:
    for parameter in engine._parameters.values():
        held = getattr(parameter, "ds_tensor", parameter)
        yield held.to_local() if isinstance(held, DTensor) else held
    if isinstance(engine, DeepSpeedEngine) and engine._optimizer_config is not None:
        yield from _flat_masters(engine._engine.optimizer, engine._stage)


@contextmanager
def _watched() -> Iterator[list[int]]:
    """[most private bytes beside those at the start, those in the end], until an engine has its weights."""
    process, most, stop = psutil.Process(os.getpid()), [0], threading.Event()

    def own() -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    before, choose = own(), PackedEngine._choose_way

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], own() - before)
            time.sleep(0.001)

    def loaded(engine: Any) -> None:
        stop.set()
        watcher.join()
        most.append(own() - before)
        choose(engine)

    PackedEngine._choose_way = loaded  # type: ignore[method-assign]
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        stop.set()
        watcher.join()
        PackedEngine._choose_way = choose  # type: ignore[method-assign]


@contextmanager
def _read_whole(whole: bool) -> Iterator[None]:
    make = load._without_memory

    def refuse(*args: Any) -> Any:
        raise ReadWhole("it was asked for")

    if whole:
        load._without_memory = refuse
    try:
        yield
    finally:
        load._without_memory = make
