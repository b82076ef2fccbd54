"""A node under way: what its ranks were called with, and what they have replied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from controller.cluster.pool import Pool
from controller.cluster.watch import Waited
from controller.execution.batch_ref import BatchRef
from controller.execution.pieces import Handed, Taker
from controller.execution.worker_group import Reading, Shards
from rlhf_dist.batch import IntArray
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.wire import Pieces, Reply

NO_SHARDS = Shards(parts=(), answering=(), part_of_answer=())


@dataclass(eq=False)
class Pending:
    """One node of one step."""

    node: Node
    step: int
    batches: tuple[BatchRef, ...]
    started_s: float
    shards: Shards = NO_SHARDS
    """Of its first batch."""
    callees: list[tuple[Pool, int]] = field(default_factory=list)
    """Pool and rank in it of each call, in the order of `replies`."""
    part_of_call: list[int] = field(default_factory=list)
    """Of generation: which part of the rows each call has."""
    refs: dict[tuple[int, ...], Any] = field(default_factory=dict)
    """Ranks (of the receiving group after the sending one) -> reference to their replies."""
    replies: dict[int, Reply] = field(default_factory=dict)
    """Rank -> its reply, once fetched."""
    source: Pending | None = None
    """What it streams from, until that is finished."""
    bundles: list[tuple[int, ...]] = field(default_factory=list)
    """Parts of the source's rows that each call of a streamed node has."""
    interrupted: bool = False
    """Its ranks were asked to stop early."""
    numbers: Mapping[str, Mapping[str, float]] | None = None
    """Of the states that its settings use, for who looks inside."""
    handed: Handed | None = None
    """What its ranks have handed over, where others take its rows piece by piece."""
    taker: Taker | None = None
    """Of whose pieces this is one."""

    @property
    def before(self) -> BatchRef | None:
        """Its first batch, whose rows it keeps or makes others of."""
        return self.batches[0] if self.batches else None

    @property
    def readings(self) -> list[Reading]:
        """Its batches as its op reads them; what a source waits for only says how many rows are drawn."""
        if self.node.kind == "source":
            return []
        return [Reading(entry, batch) for entry, batch in zip(self.node.inputs, self.batches, strict=True)]

    @property
    def waited(self) -> list[Waited]:
        """The processes that it waits for."""
        if not self.refs:
            return []
        left = [callee for call, callee in enumerate(self.callees) if call not in self.replies]
        return [Waited(pool, rank, self.started_s) for pool, rank in left]

    @property
    def complete(self) -> bool:
        """Whether all that were called have replied, and no more will be."""
        return self.source is None and len(self.replies) == self.ranks

    @property
    def ranks(self) -> int:
        """Ranks that were called."""
        return sum(map(len, self.refs))

    def pieces(self, rows: IntArray, call: int) -> Pieces | None:
        """What a call with these rows is told of pieces."""
        return None if self.handed is None else self.handed.pieces(rows, call)
