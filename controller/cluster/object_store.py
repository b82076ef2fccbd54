"""What the object store holds and what it had to spill to disk, over all nodes of the cluster."""

from __future__ import annotations

import time
from typing import Any

EVERY_S = 5.0
"""Asking every node takes some 20 ms, so not every step is asked about."""


class ObjectStore:
    """Reads the store's counters now and then. Spilling is slow: a run that spills wants a larger store."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s, self._asked_s = every_s, float("-inf")
        self._spilled_before = float(_stats().spilled_bytes_total)

    def metrics(self) -> dict[str, float]:
        """`store/used_bytes` and `store/spilled_bytes` (since this was made), or nothing if just asked."""
        if time.monotonic() - self._asked_s < self._every_s:
            return {}
        stats = _stats()
        self._asked_s = time.monotonic()
        return {
            "store/used_bytes": float(stats.object_store_bytes_used),
            "store/spilled_bytes": float(stats.spilled_bytes_total) - self._spilled_before,
        }


def _stats() -> Any:
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    # The address by name: without one, Ray looks for a cluster on this machine and there may be several.
    address = ray.get_runtime_context().gcs_address
    return get_memory_info_reply(get_state_from_address(address)).store_stats
