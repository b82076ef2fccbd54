"""Runs nodes on worker groups: resolves a node's inputs, calls every rank, collects the replies.

    launch   inputs by reference (outputs.py) -> cut into shards -> a Call for every rank
    follow   rows of a node under way (pieces.py): each piece that is there is a launch of its own
    wait     replies as they come -> shards of a streamed node sent on -> all there: collect -> outputs
                a failure, or a process that is lost -> its first cause (failed_calls.py) -> NodeError, WorkerLost

A weight transfer between pools is one node with two groups: the ranks that send and the ranks that
receive are called together. A streamed node (a rule reward) gets the rows of each rank of its source as
soon as that rank has replied, while the other ranks still generate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from controller.cluster.pool import SIGNALS, Pool
from controller.cluster.replies import RayReplies, Replies
from controller.cluster.watch import Watch
from controller.execution.batch_ref import BatchRef
from controller.execution.calls import Calls
from controller.execution.executor import Arrived, Finished
from controller.execution.failed_calls import FailedCall, NodeError, WorkerLost, error_of, lost, overdue
from controller.execution.held_states import HeldStates
from controller.execution.looking import Looking
from controller.execution.outputs import NodeOutput, Outputs, RowsError, first_groups, join, put_together
from controller.execution.pending import Pending
from controller.execution.pieces import Handed, Questions, Taker, piece_of_made, piece_of_row
from controller.execution.replicas import Replicas, hand_over, living, lost_team
from controller.execution.worker_group import Shards, WorkerGroup, collect
from rlhf_dist.batch import IntArray
from rlhf_dist.dataflow.graph import Dataflow, Node
from rlhf_dist.dataflow.pieces import takes_pieces
from rlhf_dist.failure import Failure, FailureKind, failure_of_call
from rlhf_dist.metrics import Metrics
from rlhf_dist.placement.roles import HOST_POOL
from rlhf_dist.roles import State
from rlhf_dist.wire import HeldState, Reply

INDEX_ONLY = ("join", "concat", "refill")
"""Kinds of nodes that the controller does itself: they move row indices."""
LOOK_S = 1.0
"""Between two looks for processes that are lost."""
PEERS_S = 2.0
"""A rank that says it lost another one is followed by that one's own word within so long, where it has one."""


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
        shortened: bool = False,
        states: Mapping[str, State] | None = None,
        numbers: Mapping[str, Mapping[str, Any]] | None = None,
        source_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        interrupts: bool = False,
        beside: bool = False,
        replies: Replies | None = None,
        watch: Watch | None = None,
        check: Callable[[], None] | None = None,
        replicas: Replicas | None = None,
        looking: Looking | None = None,
        pieces: int = 1,
    ) -> None:
        """shortened: call_timeout_s is what who waits has left, not the setting. numbers: what states start with, and
        how far sources have been drawn. interrupts: generation may be asked to stop early. beside: calls run beside
        whatever the ranks are doing, for ops that only look at something. watch: finds the process that is lost; None:
        there is none to lose. check: called every second while something is waited for; what it raises ends the wait.
        replicas: of pools that only generate; None: what is lost is an error. looking: what processes keep of their
        calls; None: nothing. pieces: in which others take the rows of a node that is still at it; 1: models wait for
        it, and rules take each rank's."""
        self.held = HeldStates(numbers or {})
        self.calls = Calls(
            groups,
            host,
            self.held,
            seed=seed,
            limit_s=call_timeout_s,
            states=states or {},
            source_kwargs=source_kwargs or {},
            beside=beside,
            looking=looking,
        )
        self.call_timeout_s, self._shortened = call_timeout_s, shortened
        self.outputs = Outputs(dataflow)
        self._interrupts = interrupts
        self._replies, self._watch, self._check = replies or RayReplies(), watch, check
        self._replicas = None if interrupts else replicas  # an interrupted replica holds what it has begun
        self._pieces = pieces
        self._handing = {
            source.name for source in dataflow or () for target in dataflow or () if self.follows(source, target)
        }
        self._takers: dict[tuple[str, int], Taker] = {}
        self._of_made: dict[tuple[str, int], IntArray] = {}
        """Node that hands over, step -> the piece of each row that it has made."""
        self._withdrawn: list[Finished] = []
        """Of takers that were launched for a piece which was not there any more."""
        self._questions = Questions()
        self.newest = -1
        """Latest step of which anything has been launched."""
        self._looked_s = 0.0
        self._pending: list[Pending] = []
        self._writing: list[tuple[Node, int]] = []
        self._cut_short: dict[tuple[str, int], Pending] = {}

    @property
    def groups(self) -> Mapping[str, WorkerGroup]:
        """Role -> the worker group that does its nodes."""
        return self.calls.groups

    @groups.setter
    def groups(self, groups: Mapping[str, WorkerGroup]) -> None:
        self.calls.groups = groups

    @property
    def numbers(self) -> dict[str, dict[str, float]]:
        """Of every state."""
        return self.held.numbers

    # --- the Runner protocol -------------------------------------------------------------------------
    def pools_of(self, node: Node) -> tuple[str, ...]:
        """The pools of its worker groups; host ops, sources on the host pool and joins occupy none."""
        pools = (group.pool.name for group in self.calls.groups_of(node) if group.pool.name != HOST_POOL)
        return tuple(dict.fromkeys(pools))

    def streams(self, source: Node, target: Node) -> bool:
        """A row-wise op takes rows as they come, where all it reads is made there: piece by piece, or on CPU processes
        each rank's."""
        return self.follows(source, target) or self._by_ranks(source, target)

    def follows(self, source: Node, target: Node) -> bool:
        """Piece by piece, where the op has other pools than who makes the rows."""
        apart = set(self.pools_of(target)).isdisjoint(self.pools_of(source))
        return self._pieces > 1 and takes_pieces(source, target) and apart

    def _by_ranks(self, source: Node, target: Node) -> bool:
        group = self.groups.get(target.role)
        return (
            source.kind == "op"
            and source.rows == "expand"
            and getattr(target.spec, "streams", False)
            and group is not None
            and group.pool.name == HOST_POOL
            and target.inputs[0].rows == source.name
            and not target.inputs[0].ids  # ids are made when all rows are there
            and all(origin.node == source.name for origin in target.inputs[0].columns.values())
        )

    @property
    def changing(self) -> bool:
        """Whether a step under way has begun to change weights, states, or how far a source is drawn."""
        return bool(self._writing)

    def launch(self, node: Node, step: int) -> None:
        """Send the node to its ranks."""
        self._mend(node)
        self.newest = max(self.newest, step)
        if taker := self._takers.get((node.name, step)):
            self._launch_piece(taker)
            return
        if node.weights_written:
            self._writing.append((node, step))
        again = self._cut_short.pop((node.name, step), None)
        if again is not None:
            self._launch_again(again)
            return
        source = next((p for p in self._pending if node.inputs and self._is_source(p, node, step)), None)
        if source is not None:
            self._pending.append(Pending(node, step, (), 0.0, source=source))
            return
        batches = tuple(self.outputs.input(entry, step) for entry in node.inputs)
        pending = Pending(node, step, batches, time.perf_counter())
        if node.name in self._handing:
            pending.handed = Handed(piece_of_row(len(batches[0].rows), self._pieces))
        if node.kind in INDEX_ONLY:
            pending.started_s = 0.0
        elif node.kind in ("host", "state"):
            self.calls.host_op(pending)
        else:
            self._call_ranks(pending)
        self._pending.append(pending)

    def follow(self, node: Node, step: int) -> None:
        """Have the node take the rows of the one before it as that hands them over."""
        taker = Taker(node, step, self._pieces)
        self._takers[node.name, step] = taker
        taker.of_made = self._of_made.get((taker.entry.rows, step))

    def interrupt(self, node: Node, step: int) -> None:
        """Ask the ranks that generate to stop where they are, where the run allows it."""
        pending = next((p for p in self._pending if (p.node.name, p.step) == (node.name, step)), None)
        if not self._interrupts or pending is None or pending.interrupted or node.rows != "expand":
            return
        pending.interrupted = True
        (group,) = self.calls.groups_of(node)
        for process in group.pool.processes:
            process.interrupt.options(concurrency_group=SIGNALS).remote(group.role)

    def wait(self) -> Sequence[Finished | Arrived]:
        """Block until a node is finished, or a piece is there for one; raises NodeError or WorkerLost."""
        while True:
            if arrived := self._arrived():
                return arrived
            for pending in self._pending:
                if pending.source is not None:
                    self.calls.stream(pending, pending.source)
            complete = [pending for pending in self._pending if pending.complete]
            if complete:
                self._pending = [pending for pending in self._pending if pending not in complete]
                return [self._finish(pending) for pending in complete]
            self._check_deadlines()
            if self._check is not None:
                self._check()
            self._questions.ask(self._pending)
            waiting = {
                ref: (p, ranks) for p in self._pending for ranks, ref in p.refs.items() if ranks[0] not in p.replies
            }
            # A rank that failed must not be waited for behind ranks that wait for it.
            if failed := self._take(waiting, 1.0):
                self._take_over(self._first_of(failed), failed)
                continue
            if self._watch is not None and time.perf_counter() - self._looked_s > LOOK_S:
                self._looked_s = time.perf_counter()
                if cause := self._watch.look([one for pending in self._pending for one in pending.waited]):
                    self._take_over(lost(cause, self._pending, self._watch), [])

    def _take(self, waiting: Mapping[Any, tuple[Pending, tuple[int, ...]]], timeout_s: float) -> list[FailedCall]:
        """Keep the replies that come within `timeout_s`; returns what came instead of one."""
        ready = self._replies.ready([*waiting, *self._questions.refs], timeout_s)
        failed = []
        for ref, answer in zip(ready, self._replies.get(ready, 60.0), strict=True):
            if self._questions.answered(ref, answer):
                continue
            pending, ranks = waiting[ref]
            replies: Mapping[int, Any] = dict(answer) if isinstance(answer, dict) else {ranks[0]: answer}
            for rank, reply in replies.items():
                if isinstance(reply, Reply):
                    pending.replies[rank] = reply
                else:
                    failure = reply if isinstance(reply, Failure) else failure_of_call(reply)
                    failed.append(FailedCall(pending, rank, failure))
        return failed

    def _first_of(self, failed: list[FailedCall]) -> NodeError:
        """The error for the first cause: ranks that lost a peer fail too, and may say so before it does."""
        answered = [(one.pending, one.call) for one in failed]
        deadline = time.perf_counter() + PEERS_S
        while all(one.failure.secondary for one in failed) and (left := deadline - time.perf_counter()) > 0:
            waiting = {
                ref: (p, ranks)
                for p in self._pending
                if any(one.pending is p for one in failed)
                for ranks, ref in p.refs.items()
                if not any(rank in p.replies or (p, rank) in answered for rank in ranks)
            }
            if not waiting:
                break
            more = self._take(waiting, left)
            answered += [(one.pending, one.call) for one in more]
            failed = failed + more
        return error_of(failed, self._watch)

    def end_step(self, step: int) -> None:
        """Drop what is left of a step."""
        self.outputs.end_step(step)
        self._of_made = {key: pieces for key, pieces in self._of_made.items() if key[1] > step}
        self._writing = [(node, at) for node, at in self._writing if at > step]

    @property
    def written(self) -> set[str]:
        """States (`actor.train`, `kl.state`, `prompts.drawn`) that nodes of steps which have not ended have written, or
        may have: everything else is as the last step that ended has left it."""
        return {state for node, _ in self._writing for state in node.weights_written}

    def held_state(self, name: str) -> HeldState:
        """What is held of a state now."""
        return self.held.of(name)

    def restore_state(self, name: str, held: HeldState) -> None:
        """Go on from what `held_state` gave, or a checkpoint."""
        self.held.restore(name, held)

    def run_node(self, node: Node, step: int) -> Finished:
        """Launch one node and wait for it: a live run, line by line."""
        self.launch(node, step)
        (finished,) = self.wait()
        assert isinstance(finished, Finished), "one node alone follows no other"
        return finished

    def objects(self, refs: Sequence[Any]) -> list[Any]:
        """What workers stored under these references, for looking at it."""
        return list(self._replies.get(list(refs), 60.0))

    # --- pieces ----------------------------------------------------------------------------------------
    def _arrived(self) -> list[Finished | Arrived]:
        """For whom there is a piece that the executor does not know of yet; and who has had all, and waited to hear
        which rows those were."""
        found: list[Finished | Arrived] = [*self._withdrawn]
        self._withdrawn.clear()
        for taker in list(self._takers.values()):
            if taker.told or taker.at is not None:
                continue
            if not taker.left and taker.of_made is not None:
                now = time.perf_counter()
                found.append(self._finish_taker(taker, now, now, 0))
            elif self._next_piece(taker) is not None:
                taker.told = True
                found.append(Arrived(node=taker.node.name, step=taker.step))
        return found

    def _next_piece(self, taker: Taker) -> tuple[int, BatchRef] | None:
        """The first piece whose rows are there, and those."""
        if taker.of_made is not None:
            piece = taker.left[0]
            return piece, self.outputs.input(taker.entry, taker.step).take(taker.rows(piece))
        source = self._source_of(taker)
        if source is None or source.handed is None or source.before is None:
            return None
        for piece in taker.left:
            made = source.handed.whole(source.node, source.step, source.shards, source.before, piece)
            if made is not None and len(made.rows):
                return piece, taker.read(made)
        return None

    def _source_of(self, taker: Taker) -> Pending | None:
        at = (taker.entry.rows, taker.step)
        under_way = (p for p in self._pending if (p.node.name, p.step) == at)
        return next(under_way, self._cut_short.get(at))

    def _launch_piece(self, taker: Taker) -> None:
        found, taker.told = self._next_piece(taker), False
        if found is None:  # Somebody who had made some of its rows has died since: they are made again.
            now = time.perf_counter()
            nothing = Finished(
                node=taker.node.name, step=taker.step, started_s=now, ended_s=now, metrics={}, waits=True
            )
            self._withdrawn.append(nothing)
            return
        taker.at, rows = found
        if (source := self._source_of(taker)) is not None and source.handed is not None:
            source.handed.taken.add(taker.at)
        pending = Pending(taker.node, taker.step, (rows,), time.perf_counter(), taker=taker)
        self._call_ranks(pending)
        self._pending.append(pending)

    def _finish_piece(self, pending: Pending, taker: Taker, ended_s: float) -> Finished:
        """A piece is done, and the pools are free for others; the node is finished with the last."""
        assert taker.at is not None and pending.before is not None, "it was launched with rows"
        taker.done[taker.at] = (pending.shards, [pending.replies[call] for call in range(pending.ranks)])
        taker.at = None
        tokens = int(pending.before.rows.tokens.sum())
        if taker.of_made is not None and not taker.left:
            return self._finish_taker(taker, pending.started_s, ended_s, tokens)
        return Finished(
            node=taker.node.name,
            step=taker.step,
            started_s=pending.started_s,
            ended_s=ended_s,
            metrics={},
            tokens=tokens,
            interrupted=taker.of_made is not None,
            waits=taker.of_made is None,
        )

    def _finish_taker(self, taker: Taker, started_s: float, ended_s: float, tokens: int) -> Finished:
        del self._takers[taker.node.name, taker.step]
        (group,) = self.calls.groups_of(taker.node)
        before = self.outputs.input(taker.entry, taker.step)
        output = taker.collected(before, group.pool.name)
        if output.batch is not None:
            self.outputs.put(taker.node.name, taker.step, output.batch)
        self.outputs.done(taker.node, taker.step)
        return Finished(
            node=taker.node.name,
            step=taker.step,
            started_s=started_s,
            ended_s=ended_s,
            metrics=_named(taker.node, output),
            tokens=tokens,
            nbytes=output.nbytes,
        )

    # --- replicas ----------------------------------------------------------------------------------------
    def _take_over(self, error: NodeError, failed: Sequence[FailedCall]) -> None:
        """Have other replicas generate what the lost one has not answered; raises `error` where they cannot."""
        if self._replicas is None or not isinstance(error, WorkerLost):
            raise error
        for pending in self._pending:
            pools = {pool.name: pool for pool, _ in pending.callees}.values()
            found = lost_team(self._replicas, pending.node, error, pools)
            if found is None or any(one.pending is not pending for one in failed):
                continue
            pool, team = found
            calls = [call for call, (at, rank) in enumerate(pending.callees) if at.name == pool.name and rank in team]
            # What it has answered lies in its own memory, and others may have it by now.
            if any(call in pending.replies for call in calls) or any(one.call not in calls for one in failed):
                continue
            if pending.handed is not None and not pending.handed.forget(calls):
                continue
            rows = sum(len(pending.shards.parts[part]) for part in {pending.part_of_call[call] for call in calls})
            self._replicas.lost(pool, team, rows, error)
            self._hand_over(pending, calls)
            return
        raise error

    def _call_ranks(self, pending: Pending) -> None:
        dead: Collection[int] = ()
        if self._replicas is not None and pending.node.rows == "expand":
            (group,) = self.calls.groups_of(pending.node)
            dead = self._replicas.dead(group.pool.name)
        self.calls.ranks(pending, dead)
        if dead:
            self._hand_over(pending, sorted(dead))

    def _hand_over(self, pending: Pending, calls: Sequence[int]) -> None:
        """Send the rows of these calls to replicas that live."""
        before = pending.before
        assert self._replicas is not None and before is not None, "generation has rows"
        (group,) = self.calls.groups_of(pending.node)
        teams = living(group.pool, self._replicas.dead(group.pool.name))
        pending.shards, takeovers = hand_over(pending.shards, pending.part_of_call, calls, teams, before.rows.tokens)
        self.calls.others(pending, takeovers)

    def _mend(self, node: Node) -> None:
        """Before anything but generation is asked of a pool, its dead replicas are replaced."""
        if self._replicas is None or node.rows == "expand":
            return
        for name in self.pools_of(node):
            if self._replicas.dead(name):
                self.groups = {**self.groups, **self._replicas.mend(name)}

    def _launch_again(self, pending: Pending) -> None:
        """Call the ranks that were interrupted once more."""
        self.calls.again(pending)
        pending.started_s, pending.interrupted = time.perf_counter(), False
        self._pending.insert(0, pending)

    def _is_source(self, pending: Pending, node: Node, step: int) -> bool:
        return pending.step == step and pending.node.name == node.inputs[0].rows and self._by_ranks(pending.node, node)

    def _check_deadlines(self) -> None:
        now = time.perf_counter()
        for pending in self._pending:
            if pending.refs and now - pending.started_s > self.call_timeout_s:
                raise overdue(pending, self.call_timeout_s, self._watch, shortened=self._shortened)

    # --- outputs -----------------------------------------------------------------------------------------
    def _finish(self, pending: Pending) -> Finished:
        node, step, ended = pending.node, pending.step, time.perf_counter()
        if any(reply.interrupted for reply in pending.replies.values()):
            self._cut_short[node.name, step] = pending
            return Finished(
                node=node.name, step=step, started_s=pending.started_s, ended_s=ended, metrics={}, interrupted=True
            )
        if pending.taker is not None:
            return self._finish_piece(pending, pending.taker, ended)
        output = self._moved(pending) if node.kind in INDEX_ONLY else self._collect(pending)
        started = pending.started_s or ended
        if node.kind in ("host", "state", "source"):
            started = max(started, ended - output.seconds)
        if output.batch is not None:
            self.outputs.put(node.name, step, output.batch)
        if pending.handed is not None and output.batch is not None and pending.before is not None:
            of_made = piece_of_made(output.batch, pending.before, pending.handed.of_row)
            self._of_made[node.name, step] = of_made
            for taker in self._takers.values():
                if (taker.entry.rows, taker.step) == (node.name, step):
                    taker.of_made = of_made
        for streamed in [p for p in self._pending if p.source is pending]:
            streamed.batches = (self.outputs.input(streamed.node.inputs[0], step),)
            self.calls.stream(streamed, pending)
            places = tuple(np.concatenate([output.places[answer] for answer in b]) for b in streamed.bundles)
            bundles = tuple(range(len(places)))
            streamed.shards = Shards(parts=places, answering=bundles, part_of_answer=bundles)
            streamed.source = None
        self.held.take(node.role, output)
        self.outputs.done(node, step)
        if self._replicas is not None and node.kind == "reshard":
            for name in self.pools_of(node):
                self._replicas.synced(name, step + 1)
        rows = output.batch if node.rows == "expand" and output.batch is not None else pending.before
        return Finished(
            node=node.name,
            step=step,
            started_s=started,
            ended_s=ended,
            metrics=_named(node, output),
            tokens=0 if rows is None else int(rows.rows.tokens.sum()),
            nbytes=output.nbytes,
        )

    def _collect(self, pending: Pending) -> NodeOutput:
        replies = [pending.replies[rank] for rank in range(pending.ranks)]
        pools = {pool.name for pool, _ in pending.callees}
        pool = pools.pop() if len(pools) == 1 else ""
        return collect(pending.node, pending.step, pending.shards, replies, pending.before, pool)

    def _moved(self, pending: Pending) -> NodeOutput:
        """The output of a node that moves row indices only."""
        node, batches = pending.node, pending.batches
        metrics: Metrics = {}
        try:
            if node.kind == "join":
                batch = join(batches[0].rows, batches[1], node.out, node.kwargs["on"])
            elif node.kind == "concat":
                batch = put_together(batches, ordered=node.kwargs["ordered"])
            else:
                batch, metrics = first_groups(batches, node.kwargs["groups"])
                _check_refilled(node, batches, batch)
        except RowsError as error:
            raise NodeError(f"{node.line}: {error}").of(FailureKind.DATA, pending) from error
        return NodeOutput(batch=batch, metrics=metrics, seconds=0.0, nbytes=0)


def _named(node: Node, output: NodeOutput) -> dict[str, float]:
    return {f"{metrics_of(node)}/{key}": mean.value for key, mean in output.metrics.items()}


def metrics_of(node: Node) -> str:
    """What stands before the names of a node's metrics: `actor`, `actor#2`, `gae`."""
    prefix = node.op if node.kind == "host" or node.kind in INDEX_ONLY else node.role
    return f"{prefix}#{node.name.split('#')[1]}" if "#" in node.name else prefix


def _check_refilled(node: Node, batches: Sequence[BatchRef], batch: BatchRef) -> None:
    found, wanted = len(np.unique(batch.rows.group)), node.kwargs["groups"]
    if found < wanted and node.kwargs["short"] == "stop":
        kept = ", ".join(str(len(np.unique(one.rows.group))) for one in batches)
        raise RowsError(
            f"refill has {found} of {wanted} groups after {len(batches)} rounds, which kept {kept}; raise rounds=, "
            "draw more prompts a round, let the attempt keep more, or train on fewer with short='train'"
        )
