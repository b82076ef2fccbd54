"""A role's workers: cut a batch into shards, call every rank, put the answers together.

    node + BatchRef ---- distribute ---->  Call for each rank  (row indices and object references)
    BatchRef        <--- collect --------  Reply of the answering ranks

Rows are balanced by tokens; rows of one group stay on one rank where the loss looks at whole groups;
updates are cut into mini-batches first, each balanced over the ranks. Nothing here touches data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from controller.cluster.pool import Pool
from controller.execution.batch_ref import (
    NO_PARENT,
    BatchRef,
    FetchPlan,
    RowTable,
    StoredColumn,
    made_ids,
    merge_stored,
)
from controller.execution.outputs import NodeOutput
from rlhf_dist.batch import IntArray
from rlhf_dist.dataflow.graph import Input, Node
from rlhf_dist.dataflow.host import HostOp
from rlhf_dist.dispatch import ROWS, Mesh, TransferProtocol, balance, mini_batch_of_row
from rlhf_dist.metrics import combine
from rlhf_dist.wire import Call, Given, Look, Pieces, Reply

HOST_SHARD_ROWS = 1024
"""Rows a host op's shard holds at least, unless fewer processes are there than shards."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """How a node's rows were cut: [rows of each part] and which rank answers for which part."""

    parts: tuple[IntArray, ...]
    answering: tuple[int, ...]
    part_of_answer: tuple[int, ...]
    kept: IntArray | None = None
    """[B] 1 for each row that is to be kept of those begun, spread evenly over the parts: which ones they are, the rank
    that has them says. None: all are."""

    def wanted(self, part: int) -> int | None:
        """How many of its rows `part` is to keep."""
        return None if self.kept is None else int(self.kept[self.parts[part]].sum())


@dataclass(frozen=True)
class WorkerGroup:
    """The processes of one role and its meshes."""

    role: str
    pool: Pool
    meshes: Mapping[str, Mesh] = field(default_factory=dict)

    def mesh(self, name: str) -> Mesh:
        """The mesh called `name`; plain data parallel over the pool where none was declared."""
        return self.meshes.get(name) or Mesh({"dp": self.pool.size})


class Reading:
    """One batch that a node reads, and what it reads of it: made once for a node, asked once for each rank."""

    def __init__(self, entry: Input, batch: BatchRef) -> None:
        self.batch, self.columns, self._ids = batch, tuple(entry.columns), entry.ids
        self._plan = FetchPlan(batch.select(entry.columns))

    def given(self, rows: IntArray, mini_batch: IntArray | None) -> Given:
        """What a rank is told that gets `rows`; mini_batch: [B] of all rows."""
        return Given(
            num_rows=len(rows),
            fetches=self._plan.fetches(rows),
            row_index=rows,
            mini_batch=None if mini_batch is None else mini_batch[rows],
            ids=self.batch.rows.ids(self._ids, rows),
        )


def cut(
    node: Node, group: WorkerGroup, reading: Reading | None, average: str | None, *, seed: int, step: int
) -> tuple[Shards, IntArray | None]:
    """Rows of each part of one batch of `node`, and the mini-batch of each row (None for nodes that are no updates).

    average: what the loss over these rows is averaged over.
    """
    protocol: TransferProtocol = getattr(node.spec, "dispatch", ROWS)
    mesh = group.mesh(getattr(node.spec, "mesh", "train"))
    answering = tuple(protocol.answering(mesh))
    part_of_answer = tuple(protocol.part_of(mesh, rank) for rank in answering)
    count = protocol.parts(mesh)
    if reading is None:
        empty = np.empty(0, dtype=np.int64)
        return Shards(parts=(empty,) * count, answering=answering, part_of_answer=part_of_answer), None
    rows, batch = reading.batch.rows, reading.batch.select(reading.columns)
    keep_groups = rows.group if average == "groups" else None
    mini_batch = None
    if "mini_batches" in node.kwargs:
        mini_batch = mini_batch_of_row(rows.group, int(node.kwargs["mini_batches"]), (seed, step))
        pieces: list[list[IntArray]] = [[] for _ in range(count)]
        home = batch.home(count, group.pool.name)
        for k in range(int(node.kwargs["mini_batches"])):
            inside = np.flatnonzero(mini_batch == k)
            groups = None if keep_groups is None else keep_groups[inside]
            near = None if home is None else home[inside]
            for part, chosen in enumerate(balance(rows.tokens[inside], count, groups=groups, home=near)):
                pieces[part].append(inside[chosen])
        parts = tuple(np.concatenate(piece) for piece in pieces)
    else:
        parts = tuple(balance(rows.tokens, count, groups=keep_groups, home=batch.home(count, group.pool.name)))
    kept = _kept(parts, node.kwargs.get("groups")) if node.rows == "expand" else None
    return Shards(parts=parts, answering=answering, part_of_answer=part_of_answer, kept=kept), mini_batch


def _kept(parts: Sequence[IntArray], groups: int | None) -> IntArray | None:
    """See `Shards.kept`, for `groups` of all rows: of the first k in the order of the parts, k * groups / rows."""
    if groups is None:
        return None
    rows = np.concatenate(parts)
    upto = np.arange(len(rows) + 1) * min(groups, len(rows)) // max(len(rows), 1)
    kept = np.empty(len(rows), np.int64)
    kept[rows] = np.diff(upto)
    return kept


def cut_for_host(node: Node, processes: int, batches: Sequence[BatchRef]) -> list[Shards]:
    """Contiguous shards of each batch of a host op, cut at group borders where its scope asks for whole groups."""
    total = len(batches[0].rows) if batches else 0
    scope = node.spec.scope_of(node.kwargs) if isinstance(node.spec, HostOp) else "batch"
    if scope == "batch" or total == 0:
        return [_shards((np.arange(len(batch.rows)),)) for batch in batches]
    count = min(processes, max(1, total // HOST_SHARD_ROWS))
    if scope == "rows":
        return [_shards(tuple(np.array_split(np.arange(total), count)))]
    groups = np.unique(np.concatenate([batch.rows.group for batch in batches]))
    found = []
    for batch in batches:
        part = np.searchsorted(groups, batch.rows.group) * count // len(groups)
        found.append(_shards(tuple(np.flatnonzero(part == k) for k in range(count))))
    return found


def _shards(parts: tuple[IntArray, ...]) -> Shards:
    each = tuple(range(len(parts)))
    return Shards(parts=parts, answering=each, part_of_answer=each)


def build_call(
    node: Node,
    step: int,
    seed: int,
    given: Sequence[Given],
    kwargs: Any,
    look: Look | None = None,
    wanted: int | None = None,
    pieces: Pieces | None = None,
) -> Call:
    """The instruction for one rank that is given these rows of the node's batches."""
    first = given[0] if given else Given(num_rows=0)
    own = {name: getattr(first, name) for name in ("num_rows", "fetches", "row_index", "mini_batch", "ids")}
    return Call(
        step=step,
        node=node.name,
        line=node.line,
        seed=seed,
        others=tuple(given[1:]),
        out=node.out,
        kwargs=kwargs,
        look=look,
        wanted=wanted,
        pieces=pieces,
        **own,
    )


def collect(
    node: Node, step: int, shards: Shards, replies: Sequence[Reply], before: BatchRef | None, pool: str = ""
) -> NodeOutput:
    """Put the answering ranks' replies together; before: the node's first batch. pool: whose ranks they are.

    Rows come out in an order that does not depend on placement: input order for kept rows; by input row
    and then in the worker's order for made rows.
    """
    answers = [replies[rank] for rank in shards.answering]
    # In a weight transfer every rank of both groups may report, and reports once.
    metrics = combine(reply.metrics for reply in (replies if node.kind in ("reshard", "weights") else answers))
    seconds = max((reply.seconds for reply in replies), default=0.0)
    nbytes = sum(reply.nbytes for reply in answers)
    sent = {"reshard": "sync_bytes", "weights": "copy_bytes"}.get(node.kind, "")
    if sent in metrics:
        nbytes = int(metrics[sent].value)
    state, held = next(((reply.state, reply.held) for reply in answers if reply.state is not None), (None, None))
    if not any(reply.stored or reply.parent is not None for reply in answers):
        return NodeOutput(batch=None, metrics=metrics, seconds=seconds, nbytes=nbytes, state=state, held=held)
    inputs = [shards.parts[part] for part in shards.part_of_answer]
    made = [rows if reply.parent is None else rows[reply.parent] for rows, reply in zip(inputs, answers, strict=True)]
    if node.rows == "new":
        made = [np.arange(reply.num_rows) for reply in answers]
    counts = [len(rows) for rows in made]
    origin = np.concatenate(made) if made else np.empty(0, dtype=np.int64)
    order = np.argsort(origin, kind="stable")
    stored = merge_stored([reply.stored for reply in answers], order, counts, pool)
    if node.rows == "keep":
        if before is None or len(order) != len(before.rows):
            raise RuntimeError(
                f"{node.name} must keep the {0 if before is None else len(before.rows)} rows it was given, "
                f"it returned {len(order)}"
            )
        table, carried = before.rows, dict[str, StoredColumn]()
    elif node.rows == "new":
        table = RowTable(*(np.empty(0, np.int64) for _ in range(4)))  # all of it is made below
        carried = {}
    else:
        assert before is not None, f"{node.name} has no input rows"
        moved = before.take(origin[order])
        table, carried = moved.rows, dict(moved.columns)
    return NodeOutput(
        batch=BatchRef(_row_table(node, step, table, answers, order), {**carried, **stored}),
        metrics=metrics,
        seconds=seconds,
        nbytes=nbytes,
        state=state,
        held=held,
        places=_places(order, counts),
    )


def _row_table(node: Node, step: int, table: RowTable, answers: Sequence[Reply], order: IntArray) -> RowTable:
    """What is known of the rows after `node`: `table`, that of the rows they come of, and what the ranks have said."""
    tokens = [reply.tokens for reply in answers]
    groups = [reply.groups for reply in answers]
    row_ids, parents = table.id, table.parent
    if node.rows in ("new", "expand", "derive"):
        row_ids = made_ids(step, node.place, len(order))
        parents = np.full(len(order), NO_PARENT) if node.rows == "new" else table.id
    return RowTable(
        table.group if groups[0] is None else _joined(groups)[order],
        table.tokens if tokens[0] is None else _joined(tokens)[order],
        row_ids,
        parents,
    )


def _places(order: IntArray, counts: Sequence[int]) -> tuple[IntArray, ...]:
    """For each rank, where its rows are once sorted by `order` (positions in all ranks' rows one after the other)."""
    where = np.empty_like(order)
    where[order] = np.arange(len(order))
    return tuple(np.split(where, np.cumsum(counts)[:-1]))


def _joined(arrays: Sequence[Any]) -> IntArray:
    return np.concatenate([np.asarray(array, dtype=np.int64) for array in arrays])
