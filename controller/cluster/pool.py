"""A pool as the controller sees it: processes by rank, and how to call them.

    process.call.remote(role, op, call) -> reference        replies.ready(references) -> replies.get(references)

On a cluster they are Ray actors (`cluster.py`); in a local run they are objects of this process (`local.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from rlhf_dist.failure import FailureKind

SIGNALS = "signals"
"""Concurrency group of calls that must not wait for the call under way."""
RELAYS = "relays"
"""Concurrency group of calls for other processes."""
HANDED = "handed"
"""Concurrency group of questions what the call under way has handed over, which wait for that."""
BEATS = "beats"
"""Concurrency group of questions what a process is at, which waits for nothing."""


class ClusterError(RuntimeError):
    """The cluster cannot give what the placement asks for."""

    kind = FailureKind.INFRASTRUCTURE
    """Of the failure, as it was classified where it was raised."""

    def of(self, kind: FailureKind) -> Self:
        """This error, with the kind of what made it."""
        self.kind = kind
        return self


class NoRoom(ClusterError):
    """Slots were not free within the wait for them."""

    kind = FailureKind.CODE  # of the placement: asking again would wait again


class LostInStart(ClusterError):
    """A process died while it started: another may do better."""


@dataclass(frozen=True)
class Pool:
    """A pool's processes, by rank."""

    name: str
    processes: tuple[Any, ...]
    devices: tuple[str, ...] = ()
    node_ids: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()
    leads: tuple[tuple[int, ...], ...] = ()
    """Ranks that share a machine; the first of them relays calls to the others. Empty: every rank is called."""
    team: int = 0
    """Consecutive ranks that share a process group, and come and go together; 0: all of the pool."""
    bundles: tuple[tuple[Any, int], ...] = ()
    """Of each rank: what its slot was reserved with, a placement group and the bundle in it; empty: nothing was."""
    logs: tuple[str, ...] = ()
    """File of each rank that has everything it prints, tracebacks among it; empty where they are not kept."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.processes)

    @property
    def first(self) -> Pool:
        """Its first process alone, with all that is known of it."""
        named = {
            name: getattr(self, name)[:1] for name in ("processes", "devices", "node_ids", "pids", "bundles", "logs")
        }
        return replace(self, **named, leads=(), team=0)

    def log(self, rank: int) -> str | None:
        """The log of a rank; None where none is kept."""
        return self.logs[rank] if self.logs else None

    @property
    def teams(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that are called together, through the first of them."""
        return self.leads or tuple((rank,) for rank in range(self.size))

    @property
    def nodes(self) -> tuple[int, ...]:
        """[size] machine of each rank, numbered in order of appearance; one for all where they are not known."""
        return machines(self.node_ids) or (0,) * self.size


def machines(node_ids: Sequence[str]) -> tuple[int, ...]:
    """Node ids as numbers, in order of appearance."""
    seen = list(dict.fromkeys(node_ids))
    return tuple(seen.index(node) for node in node_ids)
