"""Rows that a model takes piece by piece while others are still made: real processes' code in threads, no Ray."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import numpy as np
import pytest

from controller.cluster.blame import FirstCause
from controller.cluster.pool import Pool
from controller.cluster.watch import Waited
from controller.execution.executor import StepReport, run_steps
from controller.execution.failed_calls import NodeError, WorkerLost
from controller.execution.ray_runner import RayRunner
from controller.execution.worker_group import WorkerGroup
from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.graph import Dataflow
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.environments import Chat, Environment, Row
from rlhf_dist.failure import Failure
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.placement.roles import HOST_POOL
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.wire import Call, OpResult
from workers.process import WorkerProcess
from workers.store import LocalStore

PROMPTS, COPIES, PIECES = 10, 2, 4


class Silent(Environment):
    rewards = False

    async def episode(self, chat: Chat, row: Row) -> None: ...


@recipe
def played(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward) -> None:
    reward.compute_reward(reference.compute_ref_log_prob(actor.run_episodes(prompts, environment=Silent(), n=COPIES)))


class Source:
    def __init__(self, **given: Any) -> None: ...

    def next_batch(self, batch: Batch, call: Call, **settings: Any) -> OpResult:
        texts = Column.strings([f"row {row}" for row in range(PROMPTS)])
        columns = {"prompt_ids": Column.ragged([[row, 1] for row in range(PROMPTS)], np.int32)}
        columns |= {name: texts for name in ("prompt", "answer", "source", "fields")}
        columns["group_id"] = Column(np.arange(PROMPTS))
        groups = np.arange(PROMPTS) + PROMPTS * call.step
        return OpResult(columns=Batch(columns), tokens=np.full(PROMPTS, 2), groups=groups)


class Player:
    """Episodes whose pieces are over in an order of their own; row 3 is lost."""

    def __init__(self, context: Any, order: Sequence[int], before: Callable[[int, int], None]) -> None:
        self.context, self.order, self.before = context, order, before

    def run_episodes(self, batch: Batch, call: Call, **settings: Any) -> OpResult:
        rows = [(at, int(row), copy) for at, row in enumerate(call.row_index) for copy in range(COPIES) if row != 3]
        if call.pieces is not None:
            for piece in self.order:
                mine = [one for one in rows if call.pieces.of_row[one[0]] == piece]
                self.before(self.context.rank, piece)
                if mine:
                    self.context.hand(call, piece, self.made(mine))
        return self.made(rows)

    def made(self, rows: Sequence[tuple[int, int, int]]) -> OpResult:
        ids = [[100 * row + copy] * (1 + (7 * row + copy) % 5) for _, row, copy in rows]
        columns = {name: Column.ragged(ids, np.int32) for name in ("response_ids", "prompt_ids")}
        columns |= {name: Column.strings([""] * len(ids)) for name in ("response", "raw_response")}
        return OpResult(
            columns=Batch(columns),
            parent=np.array([at for at, _, _ in rows], np.int64),
            tokens=np.array([2 * len(one) for one in ids], np.int64),
        )


class Scorer:
    """A model that rounds by what it is given together: any other cut of the rows shows."""

    def __init__(self, before: Callable[[Batch], None], **given: Any) -> None:
        self.before = before

    def compute_ref_log_prob(self, batch: Batch, call: Call) -> OpResult:
        self.before(batch)
        ids = batch["response_ids"]
        scores = np.sin(ids.values) + float(ids.values.sum()) + 1e-3 * np.arange(len(ids.values))
        told: Metrics = {"mean": Mean(float(scores.sum()), float(len(scores)))}
        columns = Batch({"ref_log_probs": Column(scores, ids.offsets)}, batch.num_rows)
        return OpResult(columns=columns, metrics=told)


class Rule:
    """On the CPU processes, of which there is one here."""

    def __init__(self, **given: Any) -> None: ...

    def compute_reward(self, batch: Batch, call: Call) -> OpResult:
        firsts = [float(ids[0]) for ids in batch["response_ids"].rows()]
        return OpResult(columns=Batch({"rewards": Column(np.array(firsts, np.float32))}, batch.num_rows))


class Threads:
    """A worker's process: one thread that works, and one for each of Ray's concurrency groups."""

    def __init__(self, role: str, worker: type, rank: int = 0, world: int = 1, **settings: Any) -> None:
        self.process = WorkerProcess("", rank, world, None, LocalStore())
        self.process.host_role(role, worker, settings, {"seed": 0})
        self.threads: dict[str, ThreadPoolExecutor] = {}
        self.dead = False

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name, "")


class Died(Exception):
    """The end of a process, in the middle of a call."""


class _Method:
    def __init__(self, of: Threads, name: str, group: str) -> None:
        self.of, self.name, self.group = of, name, group

    def options(self, concurrency_group: str) -> _Method:
        return _Method(self.of, self.name, concurrency_group)

    def remote(self, *given: Any) -> Future[Any]:
        thread = self.of.threads.setdefault(self.group, ThreadPoolExecutor(1))
        return thread.submit(self.answer, *given)

    def answer(self, *given: Any) -> Any:
        found = Failure(lost=True, text="it died") if self.of.dead else getattr(self.of.process, self.name)(*given)
        if isinstance(found, Failure) and found.text.startswith("Died"):
            self.of.dead = True
        return Failure(lost=True, text="it died") if self.of.dead else found


class Futures:
    def ready(self, refs: Sequence[Any], timeout_s: float) -> list[Any]:
        done = wait_for(refs, timeout_s, FIRST_COMPLETED).done
        return [ref for ref in refs if ref in done]

    def get(self, refs: Sequence[Any], timeout_s: float) -> list[Any]:
        return [ref.result(timeout_s) for ref in refs]


class Watching:
    """Says that the first process is dead that is, of those that are waited for."""

    def first_cause(self, waited: Sequence[Waited], died: bool = False) -> FirstCause | None:
        dead = next(one for one in waited if one.pool.processes[one.rank].dead)
        return FirstCause(kind="process", how="was killed", node="here", pool=dead.pool.name, rank=dead.rank)

    def look(self, waited: Sequence[Waited]) -> None:
        return None


class Others:
    """Replicas of one rank each, that take over from each other."""

    def __init__(self) -> None:
        self.gone: list[int] = []

    def covers(self, pool: Pool) -> bool:
        return pool.name == "a"

    def dead(self, pool: str) -> list[int]:
        return self.gone if pool == "a" else []

    def lost(self, pool: Pool, ranks: Sequence[int], rows: int, error: WorkerLost) -> None:
        self.gone += ranks

    def mend(self, pool: str) -> dict[str, WorkerGroup]:
        return {}

    def synced(self, pool: str, steps_done: int) -> None: ...


class Run:
    """The graph on threads: two ranks that play, two of a model; what the model was given, and what it wrote."""

    def __init__(
        self,
        *,
        orders: Sequence[Sequence[int]] = (range(PIECES), range(PIECES)),
        pieces: int = PIECES,
        players: int = 2,
        before_playing: Callable[[int, int], None] = lambda rank, piece: None,
        before_scoring: Callable[[Batch], None] = lambda batch: None,
        replicas: Others | None = None,
    ) -> None:
        self.calls: list[list[int]] = []

        def seen(batch: Batch) -> None:
            self.calls.append(sorted({int(ids[0]) // 100 for ids in batch["response_ids"].rows()}))
            before_scoring(batch)

        self.processes = [
            *(
                Threads("actor", Player, rank, players, order=orders[rank % len(orders)], before=before_playing)
                for rank in range(players)
            ),
            *(Threads("reference", Scorer, rank, 2, before=seen) for rank in range(2)),
            Threads("prompts", Source),
        ]
        self.processes[-1].process.host_role("reward", Rule, {}, {"seed": 0})
        host = Pool(HOST_POOL, (self.processes[-1],))
        pools = {"actor": Pool("a", tuple(self.processes[:players]), team=1), "prompts": host, "reward": host}
        pools |= {"reference": Pool("b", tuple(self.processes[players:-1]))}
        groups = {role: WorkerGroup(role, pool) for role, pool in pools.items()}
        self.dataflow: Dataflow = trace(played)
        watch: Any = None if replicas is None else Watching()
        self.runner = RayRunner(
            self.dataflow,
            groups,
            host,
            seed=0,
            call_timeout_s=20.0,
            replies=Futures(),
            watch=watch,
            replicas=replicas,
            pieces=pieces,
        )
        self.reports: list[StepReport] = []
        self.written: list[tuple[str, list[int], list[Any]]] = []

    def steps(self, count: int = 1) -> Run:
        put, columns = self.runner.outputs.put, {"reference": "ref_log_probs", "reward": "rewards"}

        def kept(node: str, step: int, batch: Any) -> None:
            if name := columns.get(node.partition(".")[0]):
                column = batch.columns[name]
                objects = LocalStore().get(column.at.refs)
                at = zip(column.at.object_of, column.at.row_of, strict=True)
                rows = [np.asarray(objects[k][column.names[k]].row(int(row))).tolist() for k, row in at]
                self.written.append((name, batch.rows.id.tolist(), rows))
            put(node, step, batch)

        self.runner.outputs.put = kept  # type: ignore[method-assign]
        try:
            run_steps(self.dataflow, self.runner, start=0, stop=count, on_step=self.reports.append)
        finally:
            for process in self.processes:
                for thread in process.threads.values():
                    thread.shutdown(wait=False, cancel_futures=True)
        return self


def test_a_model_is_at_pieces_that_are_there_while_one_still_waits_for_its_tool() -> None:
    scored = threading.Semaphore(0)

    def tool(rank: int, piece: int) -> None:
        if piece == 1:  # of both ranks: the last
            for _ in range(3):  # the other pieces go to the reference before this one is over
                assert scored.acquire(timeout=10), "nobody takes the pieces that are there"

    run = Run(
        orders=([0, 2, 3, 1], [3, 0, 2, 1]),
        before_playing=tool,
        before_scoring=lambda batch: scored.release(),
    ).steps()
    assert len(run.calls) == 2 * PIECES, "each piece is a call of both ranks"
    spans = [one for one in run.reports[0].nodes if one.node == "reference.compute_ref_log_prob"]
    (source,) = (one for one in run.reports[0].nodes if one.node == "actor.run_episodes")
    assert len(spans) >= 2 and spans[0].ended_s < source.ended_s < spans[-1].ended_s
    assert spans[-1].metrics.keys() == {"reference/mean"} and not spans[0].metrics


def test_when_rows_came_changes_no_bit_and_how_many_ranks_made_them_does_neither() -> None:
    draw, found = random.Random(0), []
    for players in (2, 2, 3, 1):
        orders = [draw.sample(range(PIECES), PIECES) for _ in range(players)]
        run = Run(
            orders=orders, players=players, before_playing=lambda rank, piece: time.sleep(draw.random() / 50)
        ).steps(2)
        found.append((sorted(run.written), [report.metrics["reference/mean"] for report in run.reports]))
    late = Run(orders=([], []), pieces=PIECES).steps(2)  # nothing is handed over: the pieces are the same
    found.append((sorted(late.written), [report.metrics["reference/mean"] for report in late.reports]))
    assert all(one == found[0] for one in found), "to the last bit"
    ruled = [rows for name, _, rows in found[0][0] if name == "rewards"]
    assert ruled == [[100.0 * row + copy for row in range(PROMPTS) if row != 3 for copy in range(COPIES)]] * 2
    whole = Run(pieces=1).steps(2)
    assert len(whole.calls) < len(run.calls) and sorted(whole.written) != found[0][0], "of this number they do"


def test_another_replica_plays_what_a_dead_one_has_not_handed_over_and_no_bit_changes() -> None:
    whole = Run().steps(2)

    def dies(rank: int, piece: int) -> None:
        if rank == 1 and piece == 0:
            raise Died

    replicas = Others()
    run = Run(before_playing=dies, replicas=replicas).steps(2)
    assert replicas.gone == [1] and sorted(run.written) == sorted(whole.written)


def test_what_a_replica_had_handed_over_is_lost_with_it_once_somebody_has_it() -> None:
    scored = threading.Semaphore(0)

    def dies(rank: int, piece: int) -> None:
        if rank == 1 and piece == 1:
            assert scored.acquire(timeout=10)
            raise Died

    with pytest.raises(WorkerLost, match=r"actor.run_episodes \(step 0.*was killed"):
        Run(before_playing=dies, before_scoring=lambda batch: scored.release(), replicas=Others()).steps()


def test_a_piece_that_is_taken_back_before_it_is_launched_is_scored_later_and_no_bit_changes() -> None:
    """Its replica died while the pool that was to take it was busy."""
    whole, taken_back = Run().steps(2), threading.Event()

    def tool(rank: int, piece: int) -> None:
        if piece == PIECES - 1:
            assert taken_back.wait(10)

    run = Run(before_playing=tool)
    launch = run.runner.launch

    def launched(node: Any, step: int) -> None:
        if node.name == "reference.compute_ref_log_prob" and not taken_back.is_set():
            (source,) = (one for one in run.runner._pending if one.handed is not None)
            assert source.handed is not None and source.handed.replies and source.handed.forget(source.shards.answering)
            launch(node, step)
            taken_back.set()
            assert not run.calls, "there was nothing to score"
            return
        launch(node, step)

    run.runner.launch = launched  # type: ignore[method-assign]
    assert sorted(run.steps(2).written) == sorted(whole.written) and taken_back.is_set()


def test_a_failure_while_pieces_are_under_way_is_said() -> None:
    def fails(batch: Batch) -> None:
        raise ValueError("no such token")

    with pytest.raises(NodeError, match=r"reference.compute_ref_log_prob \(step 0.*no such token"):
        Run(before_scoring=fails).steps()

    def lost(rank: int, piece: int) -> None:
        if piece == 2:
            raise OSError("no tool")

    with pytest.raises(NodeError, match=r"actor.run_episodes \(step 0.*no tool"):
        Run(before_playing=lost).steps()
