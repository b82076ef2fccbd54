"""Imports without collections of garbage: torch, transformers and vLLM make 700,000 objects that all stay.

Python looks for garbage after every so many new objects, through all there are by then: a fifth of the processor time
of these imports, for nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """No collection begins inside; afterwards they are as they were."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()
