"""Collections of garbage that look at an engine, and not at everything that was ever imported.

vLLM collects three times while an engine is made and once while it ends, each time through the whole heap of the
process (a million objects: 0.7 s on a slow core); it freezes that heap when the engine stands, and thaws all of it at
its end, so that the engine is collected. Here the heap before an engine is frozen and stays so, and the engine's own
objects never are: 40 ms for each collection, in the making, between tokens, and at the end.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.engine import core
from vllm.v1.worker import gpu_worker


@contextmanager
def made_beside_a_frozen_heap() -> Iterator[None]:
    """What is there before is frozen; what vLLM makes inside is not."""
    gc.freeze()
    with _in_place_of(core, "freeze_gc_heap", _nothing), _in_place_of(gpu_worker, "freeze_gc_heap", _nothing):
        yield


@contextmanager
def frozen_heap_kept() -> Iterator[None]:
    """vLLM thaws nothing inside."""
    with _in_place_of(gc, "unfreeze", _nothing):
        yield


@contextmanager
def _in_place_of(owner: Any, name: str, function: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _nothing() -> None:
    """In place of vLLM's own."""
