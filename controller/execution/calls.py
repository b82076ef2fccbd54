"""What processes are called with: a node's rows cut into their shares, its settings, and what they keep of it.

rank op       every rank of its group, of two groups where weights go from one to the other
host op       a CPU process a part, one after the other
streamed op   a CPU process for the rows of each rank that has replied, while the others are still at it
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from controller.cluster.pool import RELAYS, SIGNALS, Pool
from controller.execution.batch_ref import BatchRef, merge_stored
from controller.execution.failed_calls import NodeError
from controller.execution.held_states import HeldStates
from controller.execution.looking import Looking
from controller.execution.pending import Pending
from controller.execution.replicas import Takeover
from controller.execution.worker_group import Reading, Shards, WorkerGroup, build_call, cut, cut_for_host
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.dataflow.state_value import resolved, states_read
from rlhf_dist.placement.roles import rollout_of
from rlhf_dist.roles import State
from rlhf_dist.wire import Call, Look

WHOLE = Shards(parts=(np.empty(0, np.int64),), answering=(0,), part_of_answer=(0,))
"""Of a node without a batch."""


class Calls:
    """Calls processes; who waits for them is the runner's business."""

    def __init__(
        self,
        groups: Mapping[str, WorkerGroup],
        host: Pool,
        held: HeldStates,
        *,
        seed: int,
        limit_s: float,
        states: Mapping[str, State],
        source_kwargs: Mapping[str, Mapping[str, Any]],
        beside: bool,
        looking: Looking | None,
    ) -> None:
        """limit_s: of a call that one process makes for others. The rest is the runner's."""
        self.groups, self.host, self.held, self.seed, self.limit_s = groups, host, held, seed, limit_s
        self.states, self.source_kwargs, self.beside, self.looking = states, source_kwargs, beside, looking
        self._next_host = 0

    def groups_of(self, node: Node) -> tuple[WorkerGroup, ...]:
        """The worker groups that do it."""
        own, apart = self.groups.get(node.role), self.groups.get(rollout_of(node.role))
        if apart is not None and own is not None and node.kind == "reshard":
            return (own, apart)
        if own is not None and node.kind == "weights":
            givers = (self.groups[role] for role in node.senders)
            return (*(group for group in givers if group.pool.name != own.pool.name), own)
        group = apart if apart is not None and rollout_of(node.role) in node.weights_read else own
        return () if group is None else (group,)

    def ranks(self, pending: Pending, dead: Collection[int]) -> None:
        """Every rank of its groups; of a node that generates, none of the `dead`."""
        node, step, readings = pending.node, pending.step, pending.readings
        groups = self.groups_of(node)
        settings, averages = self._settings(pending), averages_of(node)
        for group, (op, kwargs) in zip(groups, _ops(node, len(groups), settings), strict=True):
            cuts = [
                cut(node, group, reading, average, seed=self.seed, step=step)
                for reading, average in zip(readings or (None,), averages, strict=False)
            ]
            pending.shards = cuts[0][0] if group is groups[0] else pending.shards
            first, parts = pending.ranks, part_of_ranks(node, group)
            answering = cuts[0][0].answering
            pending.callees += [(group.pool, rank) for rank in range(group.pool.size)]
            calls = [
                build_call(
                    node,
                    step,
                    self.seed,
                    [
                        reading.given(shards.parts[part], mini_batch)
                        for reading, (shards, mini_batch) in zip(readings, cuts, strict=False)
                    ],
                    kwargs,
                    self._look(pending, part, answers=rank in answering),
                    cuts[0][0].wanted(part) if readings else None,
                    pending.pieces(cuts[0][0].parts[part], rank) if rank in answering else None,
                )
                for rank, part in enumerate(parts)
            ]
            if node.rows == "expand":
                pending.part_of_call = list(parts)
            # Rows of a rank that is done early are worth a reply of their own only where somebody streams them.
            alone = node.rows == "expand" or len(groups) > 1 or self.beside
            for ranks in [(rank,) for rank in range(len(calls)) if rank not in dead] if alone else group.pool.teams:
                process = group.pool.processes[ranks[0]]
                if self.beside:
                    ref = process.call.options(concurrency_group=SIGNALS).remote(group.role, op, calls[ranks[0]])
                elif len(ranks) == 1:
                    ref = process.call.remote(group.role, op, calls[ranks[0]])
                else:
                    relayed = {rank: calls[rank] for rank in ranks}
                    relay = process.relay.options(concurrency_group=RELAYS)
                    ref = relay.remote(group.role, op, relayed, self.limit_s)
                pending.refs[tuple(first + rank for rank in ranks)] = ref

    def again(self, pending: Pending) -> None:
        """The ranks that were interrupted; they go on with the responses they hold."""
        (group,) = self.groups_of(pending.node)
        for rank, part in enumerate(part_of_ranks(pending.node, group)):
            if pending.replies[rank].interrupted:
                self._rank(pending, group, rank, rank, part)
                del pending.replies[rank]

    def others(self, pending: Pending, takeovers: Sequence[Takeover]) -> None:
        """Replicas that take over the rows of dead ones."""
        (group,) = self.groups_of(pending.node)
        for one in takeovers:
            for number, rank in zip(one.calls, one.ranks, strict=True):
                if number == len(pending.callees):
                    pending.callees.append((group.pool, rank))
                    pending.part_of_call.append(one.part)
                pending.callees[number] = (group.pool, rank)
                self._rank(pending, group, number, rank, one.part)

    def host_op(self, pending: Pending) -> None:
        """CPU processes, for a host op or one of a state."""
        node, step, readings = pending.node, pending.step, pending.readings
        shards = cut_for_host(node, self.host.size, pending.batches)
        pending.shards = shards[0] if shards else WHOLE
        for part in range(len(pending.shards.parts)):
            given = [reading.given(one.parts[part], None) for reading, one in zip(readings, shards, strict=True)]
            call = build_call(node, step, self.seed, given, self._settings(pending), self._look(pending, part))
            process = self._host_process(pending, self.host)
            pending.refs[part,] = (
                process.run_state_op.remote(self.states[node.role], node.op, self.held.of(node.role), call)
                if node.kind == "state"
                else process.run_host_op.remote(node.spec, call)
            )

    def stream(self, pending: Pending, source: Pending) -> None:
        """CPU processes, for the rows of those ranks of `source` that have replied since."""
        sent = {answer for bundle in pending.bundles for answer in bundle}
        new = [
            answer
            for answer, rank in enumerate(source.shards.answering)
            if answer not in sent and rank in source.replies and not source.replies[rank].interrupted
        ]
        group = self.groups[pending.node.role]
        for at in range(min(len(new), group.pool.size)):
            bundle = new[at :: group.pool.size]
            call = self._streamed(pending, source, bundle)
            process = self._host_process(pending, group.pool)
            pending.refs[len(pending.bundles),] = process.call.remote(group.role, pending.node.op, call)
            pending.bundles.append(tuple(bundle))
            pending.started_s = pending.started_s or time.perf_counter()

    # --- one call ------------------------------------------------------------------------------------------
    def _rank(self, pending: Pending, group: WorkerGroup, number: int, rank: int, part: int) -> None:
        """One rank alone, with a part of the rows of a node that generates."""
        node, rows, (reading,) = pending.node, pending.shards.parts[part], pending.readings
        look = self._look(pending, part, answers=number in pending.shards.answering)
        wanted = pending.shards.wanted(part)
        pieces = pending.pieces(rows, number) if number in pending.shards.answering else None
        given, settings = [reading.given(rows, None)], self._settings(pending)
        call = build_call(node, pending.step, self.seed, given, settings, look, wanted, pieces)
        pending.refs[number,] = group.pool.processes[rank].call.remote(group.role, node.op, call)

    def _streamed(self, pending: Pending, source: Pending, bundle: list[int]) -> Call:
        shards, node = source.shards, pending.node
        replies = [source.replies[shards.answering[answer]] for answer in bundle]
        made = [
            shards.parts[shards.part_of_answer[answer]][reply.parent]
            for answer, reply in zip(bundle, replies, strict=True)
        ]
        assert source.before is not None, f"{source.node.name} has no input"
        moved = source.before.take(np.concatenate(made))
        rows = np.arange(len(moved.rows))
        stored = merge_stored([reply.stored for reply in replies], rows, [reply.num_rows for reply in replies])
        columns = {**moved.columns, **stored}
        (entry,) = node.inputs
        made_of = BatchRef(moved.rows, {c: columns[at.column] for c, at in entry.columns.items()})
        given = [Reading(entry, made_of).given(rows, None)]
        look = self._look(pending, len(pending.bundles), streamed=True)
        return build_call(node, pending.step, self.seed, given, self._settings(pending), look)

    def _host_process(self, pending: Pending, pool: Pool) -> Any:
        """The next of the CPU processes."""
        self._next_host += 1
        pending.callees.append((pool, self._next_host % pool.size))
        return pool.processes[self._next_host % pool.size]

    def _settings(self, pending: Pending) -> dict[str, Any]:
        node = pending.node
        if node.kind == "source":
            return self._source_settings(node, pending.batches)
        try:
            settings: dict[str, Any] = resolved(node.kwargs, self.held.numbers)
        except (ValueError, KeyError, ArithmeticError) as error:
            held = {state: self.held.numbers[state] for state in states_read(node.kwargs)}
            raise NodeError(f"{node.name} ({node.line}) cannot take its settings from {held}: {error!r}") from error
        return settings

    def _source_settings(self, node: Node, gate: Sequence[BatchRef]) -> dict[str, Any]:
        given = dict(self.source_kwargs.get(node.role, {}))
        if f"{node.role}.drawn" in node.weights_written:
            given["position"] = int(self.held.numbers.get(node.role, {}).get("drawn", 0))
            groups = sum(len(np.unique(batch.rows.group)) for batch in gate)
            if gate and groups >= node.kwargs["until"]:
                given["rows"] = 0
        return given

    def _look(self, pending: Pending, part: int, *, answers: bool = True, streamed: bool = False) -> Look | None:
        node = pending.node
        if self.looking is None or node.evaluation:
            return None
        if pending.taker is not None and pending.taker.at is not None:
            part, streamed = pending.taker.at * len(pending.callees) + part, True
        if pending.numbers is None:  # the same for all ranks
            states = {*states_read(node.kwargs), *([node.role] if node.kind == "state" else [])}
            pending.numbers = {state: dict(self.held.numbers[state]) for state in states}
        return self.looking.of(
            node,
            pending.step,
            part=part,
            of_rows=None if streamed or pending.before is None else len(pending.before.rows),
            answers=answers,
            streamed=streamed,
            numbers=pending.numbers,
            given=self._source_settings(node, pending.batches) if node.kind == "source" else {},
        )


def _ops(node: Node, groups: int, settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What each of a node's groups does, and its settings; the last one receives where weights go between pools."""
    if node.kind == "weights":
        return [("give_weights", {"target": node.role})] * (groups - 1) + [(node.op, settings)]
    return [("send_weights", settings), ("receive_weights", settings)] if groups > 1 else [(node.op, settings)]


def part_of_ranks(node: Node, group: WorkerGroup) -> Sequence[int]:
    """The part of the rows that each rank of `group` gets."""
    mesh = group.mesh(getattr(node.spec, "mesh", "train"))
    protocol = getattr(node.spec, "dispatch", None)
    return [protocol.part_of(mesh, rank) if protocol else 0 for rank in range(group.pool.size)]


def averages_of(node: Node) -> list[str | None]:
    """For each batch of a node, what the loss over it is averaged over; None where there is none."""
    if "terms" in node.kwargs:
        return [loss.average for loss, _ in node.kwargs["terms"]]
    return [getattr(node.kwargs.get("loss"), "average", None)] * max(1, len(node.inputs))
