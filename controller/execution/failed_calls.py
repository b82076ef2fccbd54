"""What the controller raises for calls that failed or do not come back: the first cause, in one line.

failures of a node's ranks ── one raised by itself? ──> the earliest of these            NodeError
                           └─ all lost a peer, or are lost ──> Watch.first_cause         WorkerLost
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from controller.cluster.blame import FirstCause
from controller.cluster.failure_text import explained, logs_of, shown
from controller.cluster.pool import Pool
from controller.cluster.watch import Waited, Watch
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.failure import Failure, FailureKind


class NodeError(RuntimeError):
    """A node failed; the message says which, where in the recipe, at which step, on which rank, and why."""

    kind = FailureKind.CODE
    """Of the failure, as it was classified where it was raised."""
    role = ""
    """Whose engine had the rows cut into micro-batches; empty for generation and what is no op of a role."""
    pools: tuple[str, ...] = ()
    """Where it was at work."""
    of_node: tuple[str, int] | None = None
    """Node and step."""

    def of(self, kind: FailureKind, pending: CalledNode) -> Self:
        """This error, with what is known of it."""
        node = pending.node
        self.kind, self.role = kind, node.role if node.kind == "op" and node.rows != "expand" else ""
        self.pools = tuple(dict.fromkeys(pool.name for pool, _ in pending.callees))
        self.of_node = (node.name, pending.step)
        return self


class WorkerLost(NodeError):
    """A worker process died or stopped answering: an infrastructure failure, not a data failure."""

    kind = FailureKind.INFRASTRUCTURE
    node: Node | None = None
    """What was under way."""
    step: int = 0
    cause: FirstCause | None = None
    """The first cause: process, node, signal; None: not known beyond what the text says."""

    @classmethod
    def at(cls, pending: CalledNode, text: str, cause: FirstCause | None = None) -> WorkerLost:
        """Of a node under way."""
        made = cls(text)
        made.node, made.step, made.cause = pending.node, pending.step, cause
        return made.of(FailureKind.INFRASTRUCTURE, pending)


class CalledNode(Protocol):
    """A node whose ranks were called, as the runner holds it."""

    node: Node
    step: int
    callees: list[tuple[Pool, int]]
    started_s: float

    @property
    def waited(self) -> list[Waited]:
        """The processes that have not replied."""
        ...


@dataclass(frozen=True)
class FailedCall:
    """What came instead of a reply."""

    pending: CalledNode
    call: int
    failure: Failure

    @property
    def process(self) -> tuple[Pool, int]:
        """Pool and rank."""
        return self.pending.callees[self.call]


def error_of(failed: Sequence[FailedCall], watch: Watch | None) -> NodeError:
    """The error for the first cause of these failures, of one or more ranks."""
    first = min(failed, key=lambda one: (one.failure.secondary, not one.failure.lost, one.failure.at_s))
    pool, rank = first.process
    if not first.failure.secondary:
        text = f"{_where(first.pending, rank)}: {explained(first.failure, pool.log(rank))}"
        return NodeError(text).of(first.failure.kind, first.pending)
    if watch is not None:
        waited = [Waited(pool, rank, one.started_s) for one in _nodes(failed) for pool, rank in one.callees]
        cause = watch.first_cause(waited, died=first.failure.lost)
        if cause is None and first.failure.lost and pool.node_ids:
            cause = watch.gone(pool, rank, first.failure.text.removeprefix("its process "))
        if cause is not None:
            return lost(cause, _nodes(failed), watch)
    text = f"{_where(first.pending, rank)}: {explained(first.failure, pool.log(rank))}"
    return WorkerLost.at(first.pending, text)


def lost(cause: FirstCause, pendings: Sequence[CalledNode], watch: Watch) -> WorkerLost:
    """The error for a process, a node or Ray's head that is lost while these nodes run."""
    of = next((one for one in pendings if _callee(one, cause) is not None), pendings[0])
    pool = _callee(of, cause)
    log = pool.log(cause.rank) if pool is not None else None
    where = _where(of, cause.rank) if pool is not None else _where(of)
    stacks = watch.write_stacks(of.waited, f"stacks-step-{of.step}") if cause.waiting else ""
    see = f"; see its log {shown(log)}" if log else ""
    return WorkerLost.at(of, f"{where}: {cause.text}{see}{stacks}", cause)


def overdue(pending: CalledNode, limit_s: float, watch: Watch | None, *, shortened: bool = False) -> WorkerLost:
    """The error for a node that has taken longer than a call may. shortened: than was left for it, by who waits."""
    silent = [(one.pool, one.rank) for one in pending.waited]
    logs = [log for pool, rank in silent if (log := pool.log(rank))]
    doing = watch.doing(pending.waited) if watch is not None else ""
    stacks = watch.write_stacks(pending.waited, f"stacks-step-{pending.step}") if watch is not None else ""
    limit = f"the {limit_s:.3g} s that were left" if shortened else f"ray.call_timeout_s={limit_s:g} s"
    text = (
        f"{_at(pending)} did not finish within {limit}; no reply of rank {', '.join(str(rank) for _, rank in silent)}"
        f"{doing}{logs_of(logs)}{stacks}"
    )
    return WorkerLost.at(pending, text)


def _where(pending: CalledNode, rank: int | None = None) -> str:
    on = "" if rank is None else f" on rank {rank}"
    return f"{_at(pending)} failed{on}"


def _at(pending: CalledNode) -> str:
    line = f", {pending.node.line}" if pending.node.line else ""
    return f"{pending.node.name} (step {pending.step}{line})"


def _callee(pending: CalledNode, cause: FirstCause) -> Pool | None:
    """The pool of the lost process, where this node has called it."""
    if not cause.pool:
        return None
    return next((pool for pool, rank in pending.callees if (pool.name, rank) == (cause.pool, cause.rank)), None)


def _nodes(failed: Sequence[FailedCall]) -> list[CalledNode]:
    nodes: list[CalledNode] = []
    for one in failed:
        if one.pending not in nodes:
            nodes.append(one.pending)
    return nodes
