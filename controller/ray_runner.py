"""Runs nodes on worker groups: resolves a node's inputs, calls every rank, collects the replies.

outputs[node, step] = NodeOutput          index arrays and references, dropped when nobody reads them
inputs of a node    = rows of one node's output + columns of several nodes' outputs
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from controller.batch_ref import BatchRef, StoredColumn
from controller.cluster import Pool
from controller.executor import Finished
from controller.worker_group import NodeOutput, Shards, WorkerGroup, build_call, collect, cut, cut_for_host
from rlhf_dist.batch import IntArray
from rlhf_dist.dataflow.graph import Dataflow, Input, Node
from rlhf_dist.placement.roles import HOST_POOL
from rlhf_dist.roles import State, StateValue
from rlhf_dist.wire import Reply


class NodeError(RuntimeError):
    """A node failed; the message says which, where in the recipe, at which step, on which rank, and why."""


class WorkerLost(NodeError):
    """A worker process died or stopped answering: an infrastructure failure, not a data failure."""


@dataclass(frozen=True, eq=False)
class _Pending:
    node: Node
    step: int
    refs: tuple[Any, ...]
    shards: Shards
    before: BatchRef | None
    started_s: float
    replies: dict[int, Reply] = field(default_factory=dict)
    """Rank -> its reply, once fetched."""


class RayRunner:
    """The runner of a real run. One instance serves many runs over the same groups."""

    def __init__(
        self,
        dataflow: Dataflow | None,
        groups: Mapping[str, WorkerGroup],
        host: Pool,
        *,
        seed: int,
        call_timeout_s: float,
        states: Mapping[str, State] | None = None,
        numbers: Mapping[str, Mapping[str, float]] | None = None,
        source_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.groups, self.host, self.seed, self.call_timeout_s = groups, host, seed, call_timeout_s
        self.states = dict(states or {})
        self.numbers: dict[str, dict[str, float]] = {name: dict(values) for name, values in (numbers or {}).items()}
        self.source_kwargs = source_kwargs or {}
        self.outputs: dict[tuple[str, int], NodeOutput] = {}
        self._readers = {node.name: dataflow.readers(node.name) for node in dataflow} if dataflow else {}
        self._left: dict[tuple[str, int], set[str]] = {}
        self._pending: list[_Pending] = []
        self._next_host = 0

    # --- the Runner protocol -------------------------------------------------------------------------
    def pools_of(self, node: Node) -> tuple[str, ...]:
        """The pool of the node's role; host ops, sources on the host pool and joins occupy none."""
        group = self.groups.get(node.role)
        return () if group is None or group.pool.name == HOST_POOL else (group.pool.name,)

    def launch(self, node: Node, step: int) -> None:
        """Send the node to its ranks."""
        kwargs = {key: self._number(value) for key, value in node.kwargs.items()}
        before = self._input(node, step)
        read = self._read_columns(node, step, before)
        if node.kind == "join":
            output = self._join(node, step)
            self._pending.append(_Pending(node, step, (), Shards(parts=(), answering=(), part_of_answer=()), None, 0))
            self.outputs[node.name, step] = output
            return
        if node.kind in ("host", "state"):
            assert read is not None
            shards = cut_for_host(node, self.host.size, read)
            refs = tuple(self._call_host(node, step, read, rows, kwargs) for rows in shards.parts)
        else:
            group = self.groups[node.role]
            kwargs |= dict(self.source_kwargs.get(node.name, {})) if node.kind == "source" else {}
            shards, mini_batch = cut(node, group, read, seed=self.seed, step=step)
            protocol_parts = self._part_of_rank(node, group)
            refs = tuple(
                process.call.remote(
                    group.role,
                    node.op,
                    build_call(node, step, self.seed, read, shards.parts[protocol_parts[rank]], mini_batch, kwargs),
                )
                for rank, process in enumerate(group.pool.processes)
            )
        self._pending.append(_Pending(node, step, refs, shards, before, time.perf_counter()))

    def wait(self) -> list[Finished]:
        """Block until a node is finished; raises NodeError or WorkerLost."""
        while True:
            finished = [pending for pending in self._pending if self._is_done(pending)]
            if finished:
                self._pending = [pending for pending in self._pending if pending not in finished]
                return [self._finish(pending) for pending in finished]
            self._check_deadlines()
            waiting = [ref for pending in self._pending for ref in pending.refs]
            ready, _ = ray.wait(waiting, num_returns=1, timeout=1.0, fetch_local=False)
            if ready:
                # A rank that failed must not be waited for behind ranks that wait for it.
                self._raise_failures(ready)
                self._wait_for_peers(ready[0])

    def end_step(self, step: int) -> None:
        """Drop what is left of a step."""
        for key in [key for key in self.outputs if key[1] <= step]:
            del self.outputs[key]
            self._left.pop(key, None)

    def run_node(self, node: Node, step: int) -> Finished:
        """Launch one node and wait for it: a live run, line by line."""
        self.launch(node, step)
        return self.wait()[0]

    # --- inputs ----------------------------------------------------------------------------------------
    def _column(self, origin: Any, step: int) -> StoredColumn:
        batch = self.outputs[origin.node, step].batch
        assert batch is not None, f"{origin.node} has no batch"
        return batch.columns[origin.column]

    def _rows_of(self, entry: Input, step: int) -> BatchRef:
        batch = self.outputs[entry.rows, step].batch
        assert batch is not None, f"{entry.rows} has no batch"
        return batch

    def _input(self, node: Node, step: int) -> BatchRef | None:
        """The node's (first) input with everything it reads or carries."""
        if not node.inputs:
            return None
        entry = node.inputs[0]
        columns = {name: self._column(at, step) for name, at in {**entry.carried, **entry.columns}.items()}
        return BatchRef(self._rows_of(entry, step).rows, columns)

    def _read_columns(self, node: Node, step: int, before: BatchRef | None) -> BatchRef | None:
        if before is None:
            return None
        return BatchRef(before.rows, {name: before.columns[name] for name in node.inputs[0].columns})

    def _number(self, value: Any) -> Any:
        return self.numbers[value.role][value.key] if isinstance(value, StateValue) else value

    def _join(self, node: Node, step: int) -> NodeOutput:
        left, right = self._rows_of(node.inputs[0], step), self._rows_of(node.inputs[1], step)
        keys, first, counts = np.unique(right.rows.group, return_index=True, return_counts=True)
        if np.any(counts > 1):
            group = int(keys[np.argmax(counts > 1)])
            raise NodeError(f"{node.line}: join needs one row per group on the right side, group {group} has several")
        at = np.searchsorted(keys, left.rows.group)
        found = (
            (at < len(keys)) & (keys[np.minimum(at, max(len(keys) - 1, 0))] == left.rows.group)
            if len(keys)
            else (np.zeros(len(left.rows), dtype=bool))
        )
        if not np.all(found):
            missing = int(left.rows.group[np.argmin(found)])
            raise NodeError(f"{node.line}: join finds no row of group {missing} on the right side")
        columns = {name: self._column(origin, step) for name, origin in node.inputs[1].columns.items()}
        taken = BatchRef(right.rows, columns).take(first[at])
        renamed = {node.out.get(name, name): column for name, column in taken.columns.items()}
        return NodeOutput(batch=BatchRef(left.rows, renamed), metrics={}, seconds=0.0, nbytes=0)

    # --- calls -----------------------------------------------------------------------------------------
    def _part_of_rank(self, node: Node, group: WorkerGroup) -> list[int]:
        mesh = group.mesh(getattr(node.spec, "mesh", "train"))
        protocol = getattr(node.spec, "dispatch", None)
        return [protocol.part_of(mesh, rank) if protocol else 0 for rank in range(group.pool.size)]

    def _call_host(self, node: Node, step: int, read: BatchRef, rows: IntArray, kwargs: Mapping[str, Any]) -> Any:
        process = self.host.processes[self._next_host % self.host.size]
        self._next_host += 1
        call = build_call(node, step, self.seed, read, rows, None, dict(kwargs))
        if node.kind == "state":
            return process.run_state_op.remote(self.states[node.role], node.op, self.numbers[node.role], call)
        return process.run_host_op.remote(node.spec, call)

    def _is_done(self, pending: _Pending) -> bool:
        if not pending.refs:
            return True
        ready, _ = ray.wait(list(pending.refs), num_returns=len(pending.refs), timeout=0, fetch_local=False)
        return len(ready) == len(pending.refs)

    def _wait_for_peers(self, ref: Any) -> None:
        """Ranks of one node finish almost together: give them a moment instead of spinning."""
        for pending in self._pending:
            if ref in pending.refs and len(pending.refs) > 1:
                ray.wait(list(pending.refs), num_returns=len(pending.refs), timeout=0.05, fetch_local=False)

    def _raise_failures(self, refs: Iterable[Any]) -> None:
        for pending in self._pending:
            for rank, ref in enumerate(pending.refs):
                if ref in refs:
                    self._get(pending, rank)

    def _get(self, pending: _Pending, rank: int) -> Reply:
        if rank in pending.replies:
            return pending.replies[rank]
        where = (
            f"{pending.node.name} (step {pending.step}"
            + (f", {pending.node.line}" if pending.node.line else "")
            + f") failed on rank {rank}"
        )
        try:
            return pending.replies.setdefault(rank, ray.get(pending.refs[rank], timeout=60.0))
        except ray.exceptions.RayTaskError as failed:
            cause = failed.cause
            raise NodeError(f"{where}: {type(cause).__name__}: {cause}") from failed
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as lost:
            raise WorkerLost(f"{where}: its process died or stopped answering ({type(lost).__name__})") from lost

    def _check_deadlines(self) -> None:
        now = time.perf_counter()
        for pending in self._pending:
            if pending.refs and now - pending.started_s > self.call_timeout_s:
                raise WorkerLost(
                    f"{pending.node.name} (step {pending.step}, {pending.node.line}) did not finish within "
                    f"ray.call_timeout_s={self.call_timeout_s:g} s"
                )

    # --- outputs -----------------------------------------------------------------------------------------
    def _finish(self, pending: _Pending) -> Finished:
        node, step = pending.node, pending.step
        ended = time.perf_counter()
        started = pending.started_s or ended
        if pending.refs:
            replies = [self._get(pending, rank) for rank in range(len(pending.refs))]
            output = collect(node, pending.shards, replies, pending.before)
            started = max(started, ended - output.seconds) if node.kind in ("host", "state", "source") else started
            self.outputs[node.name, step] = output
            if output.state is not None:
                self.numbers[node.role] = dict(output.state)
        self._drop_read(node, step)
        prefix = node.op if node.kind in ("host", "join") else node.role
        suffix = f"#{node.name.split('#')[1]}" if "#" in node.name else ""
        metrics = {f"{prefix}{suffix}/{key}": mean.value for key, mean in self.outputs[node.name, step].metrics.items()}
        return Finished(node=node.name, step=step, started_s=started, ended_s=ended, metrics=metrics)

    def _drop_read(self, node: Node, step: int) -> None:
        """Forget outputs whose last reader is done, so that the object store can free them."""
        self._left[node.name, step] = set(self._readers.get(node.name, ()))
        for entry in node.inputs:
            origins: Sequence[str] = [
                entry.rows,
                *(at.node for at in (*entry.columns.values(), *entry.carried.values())),
            ]
            for origin in dict.fromkeys(origins):
                left = self._left.get((origin, step))
                if left is not None and node.name in left:
                    left.discard(node.name)
                    if not left:
                        self.outputs.pop((origin, step), None)
