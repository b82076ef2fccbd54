"""Rows that models of other pools, and rules, take piece by piece, while the node that makes them is still at it.

    actor.run_episodes, rows cut into 4 pieces    rank 0  [0 . 2 .]   rank 1  [0 1 2 .]    handed over so far
    reference.compute_ref_log_prob                 piece 0 done, piece 2 under way; 1 and 3 wait for somebody's tool

A piece is a share of the rows that the node was given, in their order: how many ranks there are, and which of them is
first, decides nothing. Its rows go through the model together, packed by themselves, so that results are those of
`placement.pieces`, to the last bit, whatever came when. Each piece is a call of all ranks of the pool that takes it,
one at a time, which keeps their collectives in step; between two pieces the pool is free for others.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from controller.cluster.pool import HANDED, Pool
from controller.execution.batch_ref import BatchRef
from controller.execution.outputs import NodeOutput
from controller.execution.worker_group import Shards, collect
from rlhf_dist.batch import IntArray
from rlhf_dist.dataflow.graph import Input, Node
from rlhf_dist.wire import Pieces, Reply

WAIT_S = 10.0
"""Longest that a question what has been handed over waits for an answer."""


@dataclass(eq=False)
class Handed:
    """What has come of the rows of a node under way."""

    of_row: IntArray
    """[B] the piece of each row that the node was given."""
    ticket: str = field(default_factory=lambda: uuid.uuid4().hex)
    replies: dict[tuple[int, int], Reply] = field(default_factory=dict)
    """(call, piece) -> its rows."""
    asked: set[int] = field(default_factory=set)
    """Calls of which an answer is on its way."""
    taken: set[int] = field(default_factory=set)
    """Pieces that somebody has taken."""
    _held_by: tuple[Shards | None, dict[int, list[int]]] = field(default_factory=lambda: (None, {}))
    """Piece -> answers with rows of it, of these shards: the controller looks at each turn."""

    def pieces(self, rows: IntArray, call: int) -> Pieces:
        """What a call with these rows is told; a rank may get several, one after the other."""
        return Pieces(ticket=self.ticket_of(call), of_row=self.of_row[rows])

    def ticket_of(self, call: int) -> str:
        """By which the call's process knows what it has handed over."""
        return f"{self.ticket}/{call}"

    def forget(self, calls: Sequence[int]) -> bool:
        """These calls are asked of others. False where somebody has what they had handed over."""
        if any(call in calls and piece in self.taken for call, piece in self.replies):
            return False
        self.replies = {key: reply for key, reply in self.replies.items() if key[0] not in calls}
        self.asked -= set(calls)
        return True

    def holders(self, shards: Shards, piece: int) -> list[int]:
        """Answers whose rows are of this piece, some of them."""
        if self._held_by[0] is not shards:
            held_by: dict[int, list[int]] = {}
            for answer, part in enumerate(shards.part_of_answer):
                for one in np.unique(self.of_row[shards.parts[part]]).tolist():
                    held_by.setdefault(one, []).append(answer)
            self._held_by = shards, held_by
        return self._held_by[1].get(piece, [])

    def whole(self, node: Node, step: int, shards: Shards, before: BatchRef, piece: int) -> BatchRef | None:
        """The rows of a piece, in the order that they have among all; None where some are not there yet."""
        holders = self.holders(shards, piece)
        keys = [(shards.answering[answer], piece) for answer in holders]
        if not holders or not all(key in self.replies for key in keys):
            return None
        each = tuple(range(len(holders)))
        parts = tuple(shards.parts[shards.part_of_answer[answer]] for answer in holders)
        cut = Shards(parts=parts, answering=each, part_of_answer=each)
        return collect(node, step, cut, [self.replies[key] for key in keys], before).batch


class HandingNode(Protocol):
    """A node under way, as the runner holds it."""

    handed: Handed | None
    shards: Shards
    callees: list[tuple[Pool, int]]
    replies: dict[int, Reply]
    interrupted: bool


class Questions:
    """To ranks, what they have handed over: one at a time to each, which it answers when there is something."""

    def __init__(self) -> None:
        self._asked: dict[Any, tuple[HandingNode, int, tuple[Pool, int]]] = {}

    @property
    def refs(self) -> list[Any]:
        """References to the answers."""
        return list(self._asked)

    def ask(self, nodes: Iterable[HandingNode]) -> None:
        """Every rank that may hand something over, and is not asked."""
        for node in (one for one in nodes if one.handed is not None and not one.interrupted):
            assert node.handed is not None
            for call in node.shards.answering:
                if call not in node.replies and call not in node.handed.asked:
                    pool, rank = node.callees[call]
                    handed = pool.processes[rank].handed.options(concurrency_group=HANDED)
                    ref = handed.remote(node.handed.ticket_of(call), WAIT_S)
                    self._asked[ref] = (node, call, (pool, rank))
                    node.handed.asked.add(call)

    def answered(self, ref: Any, answer: Any) -> bool:
        """Whether this is an answer to a question. Where a rank could not say, its call says what became of it."""
        if ref not in self._asked:
            return False
        node, call, asked = self._asked.pop(ref)
        if node.handed is not None and node.callees[call] == asked:  # else another has its rows by now
            node.handed.asked.discard(call)
            if isinstance(answer, list):
                node.handed.replies |= {(call, piece): reply for piece, reply in answer}
        return True


def piece_of_row(rows: int, pieces: int) -> IntArray:
    """[rows] pieces of about equally many rows, in their order."""
    return np.arange(rows) * pieces // max(rows, 1)


def piece_of_made(made: BatchRef, before: BatchRef, of_row: IntArray) -> IntArray:
    """[B'] the piece of each row that was made of those `before`, whose pieces are `of_row`."""
    order = np.argsort(before.rows.id, kind="stable")
    found: IntArray = of_row[order[np.searchsorted(before.rows.id, made.rows.parent, sorter=order)]]
    return found


@dataclass(eq=False)
class Taker:
    """A node that takes the rows of another piece by piece."""

    node: Node
    step: int
    count: int
    """Pieces that there are at most."""
    of_made: IntArray | None = None
    """[B'] the piece of each row, once all are made."""
    told: bool = False
    """The executor knows that there is a piece, and has not come for it."""
    at: int | None = None
    """The piece under way."""
    done: dict[int, tuple[Shards, list[Reply]]] = field(default_factory=dict)

    @property
    def entry(self) -> Input:
        """What it reads."""
        return self.node.inputs[0]

    @property
    def left(self) -> list[int]:
        """Pieces that are not done; of no rows at all it is one, since what a node writes has types."""
        if self.of_made is None:
            return [piece for piece in range(self.count) if piece not in self.done]
        there = np.unique(self.of_made).tolist() or [0]
        return [piece for piece in there if piece not in self.done]

    def read(self, made: BatchRef) -> BatchRef:
        """Rows of the source as the node sees them."""
        return BatchRef(made.rows, {name: made.columns[at.column] for name, at in self.entry.columns.items()})

    def rows(self, piece: int) -> IntArray:
        """Positions of a piece's rows among all."""
        assert self.of_made is not None, "positions are known once all rows are made"
        return np.flatnonzero(self.of_made == piece)

    def collected(self, before: BatchRef, pool: str) -> NodeOutput:
        """What the node wrote, as if it had been given all rows at once. Pieces count in their order, and not in that
        in which they came."""
        parts: list[IntArray] = []
        answering: list[int] = []
        part_of_answer: list[int] = []
        replies: list[Reply] = []
        for piece in sorted(self.done):
            shards, own = self.done[piece]
            positions = self.rows(piece)
            answering += [len(replies) + answer for answer in shards.answering]
            part_of_answer += [len(parts) + part for part in shards.part_of_answer]
            parts += [positions[part] for part in shards.parts]
            replies += own
        cut = Shards(parts=tuple(parts), answering=tuple(answering), part_of_answer=tuple(part_of_answer))
        return collect(self.node, self.step, cut, replies, before, pool)
