"""How vLLM's memory leaves its device and comes back: its own sleep on CUDA, the same in host memory on a CPU.

    cache     its contents are not wanted back: prefixes are forgotten first
    weights   kept in host memory (vLLM's level 1), or not, where a sync follows (level 2); buffers are kept in either

Each part goes and comes alone: nothing is woken to be put to sleep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm.v1.engine.llm_engine import LLMEngine

from workers.engines.generation import vllm_weights
from workers.engines.generation.interface import SleepPart
from workers.engines.movable import Movable


class Bed(Protocol):
    """Where the parts of an engine sleep."""

    asleep: set[SleepPart]

    def held_bytes(self) -> dict[SleepPart, int]:
        """Bytes of each part on the device now."""
        ...

    def lay(self, part: SleepPart, keep: bool) -> int:
        """Put an awake part to sleep. Returns bytes copied."""
        ...

    def wake(self, part: SleepPart) -> int:
        """Wake a part that sleeps. Returns bytes copied."""
        ...

    def written(self) -> None:
        """The weights are about to change."""
        ...


class CudaBed:
    """vLLM's allocator unmaps what sleeps; it keeps weights in pinned memory."""

    _TAGS: dict[SleepPart, str] = {"weights": "weights", "cache": "kv_cache"}

    def __init__(self, engine: LLMEngine) -> None:
        self._engine, self._executor = engine, engine.model_executor
        self._sizes: dict[SleepPart, int] = {
            "weights": _storage_bytes(_model(engine).parameters()),
            "cache": _storage_bytes(_tensors(_runner(engine).kv_caches)),
        }
        self._kept = False
        self.asleep: set[SleepPart] = set()

    def held_bytes(self) -> dict[SleepPart, int]:
        """See Bed."""
        return {part: 0 if part in self.asleep else size for part, size in self._sizes.items()}

    def lay(self, part: SleepPart, keep: bool) -> int:
        """See Bed."""
        self.asleep.add(part)
        if part == "cache":
            self._engine.reset_prefix_cache()
            self._executor.discard((self._TAGS[part],))
            return 0
        # The executor's sleep passes over what sleeps already; the engine's would also pause the scheduler.
        self._executor.sleep(level=1 if keep else 2)
        self._kept = keep
        return self._sizes[part] if keep else 0

    def wake(self, part: SleepPart) -> int:
        """See Bed."""
        self.asleep.remove(part)
        self._executor.wake_up([self._TAGS[part]])
        return self._sizes[part] if part == "weights" and self._kept else 0

    def written(self) -> None:
        """See Bed. Each sleep copies anew."""


class HostBed:
    """The same on a CPU: storages of weights and cache are emptied, kernels packed of weights are dropped."""

    def __init__(self, engine: LLMEngine, device: torch.device) -> None:
        self._engine, self._device = engine, device
        self._parts: dict[SleepPart, Movable] = {}
        self._kept = True
        self.asleep: set[SleepPart] = set()

    def held_bytes(self) -> dict[SleepPart, int]:
        """See Bed."""
        return {part: movable.held_bytes for part, movable in self._movables().items()}

    def lay(self, part: SleepPart, keep: bool) -> int:
        """See Bed."""
        self.asleep.add(part)
        if part == "cache":
            self._engine.reset_prefix_cache()
        else:
            vllm_weights.open_for_writing(_model(self._engine))
            self._kept = keep
        return self._movables()[part].leave(keep)

    def wake(self, part: SleepPart) -> int:
        """See Bed."""
        self.asleep.remove(part)
        copied = self._movables()[part].come()
        if part == "weights" and self._kept:
            vllm_weights.pack(_model(self._engine))
        return copied

    def written(self) -> None:
        """See Bed."""
        self._movables()["weights"].written()

    def _movables(self) -> dict[SleepPart, Movable]:
        if not self._parts:
            model = _model(self._engine)
            caches = _tensors(_runner(self._engine).kv_caches)
            self._parts = {
                "weights": Movable(vllm_weights.plain_weights(model), self._device),
                "cache": Movable(caches, self._device, comes_as="zeros"),
            }
        return self._parts


def _runner(engine: LLMEngine) -> Any:
    return engine.model_executor.driver_worker.worker.model_runner


def _model(engine: LLMEngine) -> nn.Module:
    model: nn.Module = _runner(engine).model
    return model


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _tensors(nested: Any) -> Iterator[Tensor]:
    """Tensors in lists of lists: layers of some kinds keep several."""
    if isinstance(nested, Tensor):
        yield nested
    else:
        for inner in nested:
            yield from _tensors(inner)
