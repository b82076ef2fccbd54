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

from controller.batch_ref import BatchRef, FetchPlan, RowTable, StoredColumn, merge_stored
from controller.outputs import NodeOutput
from controller.pool import Pool
from rlhf_dist.batch import IntArray
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.dataflow.host import HostOp
from rlhf_dist.dispatch import ROWS, Mesh, TransferProtocol, balance, mini_batch_of_row
from rlhf_dist.metrics import combine
from rlhf_dist.wire import Call, Reply

HOST_SHARD_ROWS = 1024
"""Rows a host op's shard holds at least, unless fewer processes are there than shards."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """How a node's rows were cut: [rows of each part] and which rank answers for which part."""

    parts: tuple[IntArray, ...]
    answering: tuple[int, ...]
    part_of_answer: tuple[int, ...]


@dataclass(frozen=True)
class WorkerGroup:
    """The processes of one role and its meshes."""

    role: str
    pool: Pool
    meshes: Mapping[str, Mesh] = field(default_factory=dict)

    def mesh(self, name: str) -> Mesh:
        """The mesh called `name`; plain data parallel over the pool where none was declared."""
        return self.meshes.get(name) or Mesh({"dp": self.pool.size})


def cut(node: Node, group: WorkerGroup, batch: BatchRef | None, *, seed: int, step: int) -> tuple[Shards, Any]:
    """Rows of each part for `node`, and the mini-batch of each row (None for nodes that are no updates)."""
    protocol: TransferProtocol = getattr(node.spec, "dispatch", ROWS)
    mesh = group.mesh(getattr(node.spec, "mesh", "train"))
    answering = tuple(protocol.answering(mesh))
    part_of_answer = tuple(protocol.part_of(mesh, rank) for rank in answering)
    count = protocol.parts(mesh)
    if batch is None:
        empty = np.empty(0, dtype=np.int64)
        return Shards(parts=(empty,) * count, answering=answering, part_of_answer=part_of_answer), None
    rows = batch.rows
    loss = node.kwargs.get("loss")
    keep_groups = rows.group if getattr(loss, "average", None) == "groups" else None
    mini_batch = None
    if "mini_batches" in node.kwargs:
        mini_batch = mini_batch_of_row(rows.group, int(node.kwargs["mini_batches"]), (seed, step))
        pieces: list[list[IntArray]] = [[] for _ in range(count)]
        home = batch.home(count)
        for k in range(int(node.kwargs["mini_batches"])):
            inside = np.flatnonzero(mini_batch == k)
            groups = None if keep_groups is None else keep_groups[inside]
            near = None if home is None else home[inside]
            for part, chosen in enumerate(balance(rows.tokens[inside], count, groups=groups, home=near)):
                pieces[part].append(inside[chosen])
        parts = tuple(np.concatenate(piece) for piece in pieces)
    else:
        parts = tuple(balance(rows.tokens, count, groups=keep_groups, home=batch.home(count)))
    return Shards(parts=parts, answering=answering, part_of_answer=part_of_answer), mini_batch


def cut_for_host(node: Node, processes: int, batch: BatchRef) -> Shards:
    """Contiguous shards for a host op, cut at group borders where its scope asks for whole groups."""
    total = len(batch.rows)
    scope = node.spec.scope_of(node.kwargs) if isinstance(node.spec, HostOp) else "batch"
    if scope == "batch" or total == 0:
        return Shards(parts=(np.arange(total),), answering=(0,), part_of_answer=(0,))
    count = min(processes, max(1, total // HOST_SHARD_ROWS))
    if scope == "rows":
        parts = tuple(np.array_split(np.arange(total), count))
    else:
        _, unit = np.unique(batch.rows.group, return_inverse=True)
        part_of_unit = np.arange(unit.max() + 1) * count // (unit.max() + 1)
        parts = tuple(np.flatnonzero(part_of_unit[unit] == part) for part in range(count))
    return Shards(parts=parts, answering=tuple(range(count)), part_of_answer=tuple(range(count)))


def build_call(
    node: Node, step: int, seed: int, plan: FetchPlan | None, rows: IntArray, mini_batch: IntArray | None, kwargs: Any
) -> Call:
    """The instruction for one rank that gets `rows`."""
    return Call(
        step=step,
        node=node.name,
        line=node.line,
        seed=seed,
        num_rows=len(rows),
        fetches=plan.fetches(rows) if plan else (),
        row_index=rows,
        mini_batch=None if mini_batch is None else mini_batch[rows],
        out=node.out,
        kwargs=kwargs,
    )


def collect(node: Node, shards: Shards, replies: Sequence[Reply], before: BatchRef | None) -> NodeOutput:
    """Put the answering ranks' replies together.

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
    state = next((reply.state for reply in answers if reply.state is not None), None)
    if not any(reply.stored or reply.parent is not None for reply in answers):
        return NodeOutput(batch=None, metrics=metrics, seconds=seconds, nbytes=nbytes, state=state)
    inputs = [shards.parts[part] for part in shards.part_of_answer]
    made = [rows if reply.parent is None else rows[reply.parent] for rows, reply in zip(inputs, answers, strict=True)]
    if node.rows == "new":
        made = [np.arange(reply.num_rows) for reply in answers]
    counts = [len(rows) for rows in made]
    origin = np.concatenate(made) if made else np.empty(0, dtype=np.int64)
    order = np.argsort(origin, kind="stable")
    stored = merge_stored([reply.stored for reply in answers], order, counts)
    if node.rows == "keep":
        if before is None or len(order) != len(before.rows):
            raise RuntimeError(
                f"{node.name} must keep the {0 if before is None else len(before.rows)} rows it was given, "
                f"it returned {len(order)}"
            )
        rows_table = before.rows
        carried: Mapping[str, StoredColumn] = {}
    elif node.rows == "new":
        rows_table = RowTable(_joined([r.groups for r in answers]), _joined([r.tokens for r in answers]))
        carried = {}
    else:
        assert before is not None, f"{node.name} has no input rows"
        moved = before.take(origin[order])
        tokens = [reply.tokens for reply in answers]
        rows_table = moved.rows if tokens[0] is None else RowTable(moved.rows.group, _joined(tokens)[order])
        carried = moved.columns
    return NodeOutput(
        batch=BatchRef(rows_table, {**carried, **stored}),
        metrics=metrics,
        seconds=seconds,
        nbytes=nbytes,
        state=state,
        places=_places(order, counts),
    )


def _places(order: IntArray, counts: Sequence[int]) -> tuple[IntArray, ...]:
    """For each rank, where its rows are once sorted by `order` (positions in all ranks' rows one after the other)."""
    where = np.empty_like(order)
    where[order] = np.arange(len(order))
    return tuple(np.split(where, np.cumsum(counts)[:-1]))


def _joined(arrays: Sequence[Any]) -> IntArray:
    return np.concatenate([np.asarray(array, dtype=np.int64) for array in arrays])
