"""How the controller hears from workers: Ray in a run, nothing to wait for in a local one, a clock in a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rlhf_dist.failure import Failure
from rlhf_dist.wire import Reply

Answer = Reply | Failure | dict[int, Reply | Failure] | Exception

PEERS_S = 0.02
"""Ranks of one node finish almost together: the wait for the others once one is there, instead of spinning."""


class Replies(Protocol):
    """Waits for replies and fetches them. References are what a worker's call returned."""

    def ready(self, refs: Sequence[Any], timeout_s: float) -> list[Any]:
        """Those of `refs` that can be fetched, after waiting for at least one; none when the time is over."""
        ...

    def get(self, refs: Sequence[Any], timeout_s: float) -> list[Answer]:
        """The replies (of several ranks, where one relayed), or what their calls raised."""
        ...


class RayReplies:
    """Replies of Ray actors."""

    def ready(self, refs: Sequence[Any], timeout_s: float) -> list[Any]:
        """See Replies."""
        import ray

        first, rest = ray.wait(list(refs), num_returns=1, timeout=timeout_s, fetch_local=False)
        if first and rest:
            others, _ = ray.wait(
                rest, num_returns=len(rest), timeout=0 if timeout_s == 0 else PEERS_S, fetch_local=False
            )
            return first + others
        return list(first)

    def get(self, refs: Sequence[Any], timeout_s: float) -> list[Answer]:
        """See Replies."""
        import ray

        try:
            return list(ray.get(list(refs), timeout=timeout_s))
        except ray.exceptions.RayError as error:
            return [error] if len(refs) == 1 else [self.get([ref], timeout_s)[0] for ref in refs]
