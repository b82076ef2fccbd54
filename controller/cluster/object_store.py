"""What the object store holds and what it had to spill to disk, over all nodes of the cluster.

A number for people to look at: a node that does not answer must not hold a step up, nor end it, so it is asked for in
a thread of its own, and is missing for as long as a node is.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

EVERY_S = 5.0
"""Ray asks every node, which takes some 20 ms with few of them, so not every step is asked about."""
WAIT_S = 0.5
"""Longest that a step waits for the answer."""
LIMIT_S = 20.0
"""Ray gives nodes that do not answer so long."""


class ObjectStore:
    """Reads the store's counters now and then. Spilling is slow: a run that spills wants a larger store."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s, self._asked_s = every_s, float("-inf")
        self._spilled_before: float | None = None
        self._answer: Any = None
        self._asking = self._ask()
        self._asking.join(WAIT_S)

    def metrics(self) -> dict[str, float]:
        """`store/used_bytes` and `store/spilled_bytes` (since this was made); nothing if just asked or
        not answered."""
        if not self._asking.is_alive() and time.monotonic() - self._asked_s > self._every_s:
            self._asked_s = time.monotonic()
            self._asking = self._ask()
            self._asking.join(WAIT_S)
        stats, self._answer = self._answer, None
        if stats is None:
            return {}
        return {
            "store/used_bytes": float(stats.object_store_bytes_used),
            "store/spilled_bytes": float(stats.spilled_bytes_total) - (self._spilled_before or 0.0),
        }

    def _ask(self) -> threading.Thread:
        def ask() -> None:
            with suppress(Exception):  # of gRPC, of Ray's state, of a head that is gone: others say that
                stats = _stats()
                if self._spilled_before is None:
                    self._spilled_before = float(stats.spilled_bytes_total)
                else:
                    self._answer = stats

        thread = threading.Thread(target=ask, name="object store", daemon=True)
        thread.start()
        return thread


def _stats() -> Any:
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    # The address by name: without one, Ray looks for a cluster on this machine and there may be several.
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return get_memory_info_reply(state, timeout_seconds=LIMIT_S).store_stats
