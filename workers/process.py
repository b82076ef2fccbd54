"""The one process of a slot: a Ray actor, or this process in a local run.

It hosts role workers, pulls the rows an op needs, stores what it wrote.

Ray calls, one at a time, in the controller's order
  import_ahead         what its roles need, while other processes start
  open_port / join     rendezvous of the pool's process group (pools of CPU helpers skip it)
  connect              one end of the way that weights take between two pools
  host_role            build a role worker here: an engine, a rule, a data source
  call                 Call -> pull rows -> worker.op(batch, call, **settings) -> store -> Reply
  run_host_op          the same for a pure function
  relay                the same call for several ranks of this machine, in their name to the controller
  interrupt            runs beside another call: generation stops early, and is called again
  handed               beside another call: what that has handed over so far (handing.py)
  beat                 beside all others: what this process is at, and how its neighbours stand (heartbeat.py)
  abandon              the step is given up: what was kept to go on with is forgotten
  copy_state, put_back what a rank holds of a role that learns, to and from the memory of another node

What is raised in any of them comes back as a `Failure` (failures.py), never as an exception.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import inspect
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch, Column, IntArray
from rlhf_dist.dataflow.host import HostOp, HostResult, as_result
from rlhf_dist.dataflow.op_settings import RANDOM, defaults
from rlhf_dist.failure import Failure, failure_of_call
from rlhf_dist.heartbeat import Beat
from rlhf_dist.missing import refuse_missing
from rlhf_dist.sampling import seed_of
from rlhf_dist.schema import SEQUENCE
from rlhf_dist.wire import Bridge, Call, Fetch, Given, HeldState, OpResult, Reply, WorkerContext, numbers_in
from workers.failures import refuse_breakpoint, reported
from workers.handing import Handing
from workers.heartbeat import Activity
from workers.importing import without_collections
from workers.looking import Seen, looked_at
from workers.states import check_values, held_state, read_state, values_of, write_state
from workers.store import RayStore, Store

_log = logging.getLogger(__name__)
_FRESH_S = 4.0
"""What a network file system may take to show a file that another node has just written."""


class WorkerProcess:
    """Hosts role workers of one slot. Wrapped with `ray.remote` by the controller, or used as it is in a local run."""

    def __init__(
        self,
        pool: str,
        rank: int,
        world: int,
        log_file: str | None,
        store: Store | None = None,
        folder: str | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """variables: of the environment, which only this call shows. store: where columns lie; None: Ray's, and this
        process is one of its actors. folder: what relative paths are relative to, where this node has it: the
        controller's."""
        os.environ.update(variables or {})
        self.pool, self.rank, self.world = pool, rank, world
        self.store: Store = store or RayStore()
        self.is_actor = store is None
        self.device = "cpu"
        self._joined = False
        self._team: tuple[int, ...] = ()
        self._memory: Any = None
        self._gauges: Any = None
        self._roles: dict[str, Any] = {}
        self._peers: dict[int, Any] = {}
        self._phase = ""
        self.activity = Activity()
        self._handing = Handing()
        if store is None:
            sys.breakpointhook = refuse_breakpoint
        if log_file:
            _redirect_output(Path(log_file))
            faulthandler.enable()  # to the log: where it was at a SIGSEGV, SIGABRT, SIGBUS, SIGFPE or SIGILL
        if folder is not None and os.path.isdir(folder):
            os.chdir(folder)

    def pid(self) -> tuple[int, str]:
        """Process id and node id."""
        import ray

        return os.getpid(), ray.get_runtime_context().get_node_id()

    def import_ahead(self, modules: Sequence[str]) -> None:
        """Import what roles to come need: most of the seconds that a process takes to start. One that cannot be
        imported ends this, and is named where its role is built, which imports it again."""
        with without_collections(), suppress(Exception):
            for module in modules:
                importlib.import_module(module)
        if self.is_actor:
            gc.freeze()  # nothing of it ever becomes garbage, and no collection goes through it any more

    def watch(self, pids: Sequence[int]) -> None:
        """Processes of this machine whose end this one is to see."""
        self.activity.watch(pids)

    def beat(self, about: Sequence[int] = (), stacks: bool = False) -> Beat:
        """What this process is at; about: neighbours (pids) to look at. Called in a concurrency group of its own."""
        return self.activity.beat(about, stacks)

    def gauges(self) -> dict[str, float]:
        """What its GPU was at since this was last called; nothing on a CPU. Called in the group of `beat`."""
        return {} if self._gauges is None else self._gauges.told()

    @reported
    def open_port(self) -> tuple[str, int, str]:
        """Where ranks can meet this one, whose process listens there from now on, and the secret of their meeting;
        called on rank 0."""
        from workers.network import new_secret, reserve_port

        address = self._address()
        return address, reserve_port(address), new_secret()

    @reported
    def join(
        self,
        address: str,
        port: int,
        secret: str,
        device: str,
        one_node: bool,
        timeout_s: float,
        team: tuple[int, ...] = (),
    ) -> str:
        """Join the pool's process group, whose collectives end within `timeout_s` or raise. Returns the device.

        team: the ranks that share one with this, where not all of the pool do; they meet at the first of them.
        """
        from workers.device import device_for, init_distributed
        from workers.network import use_network

        self._team = team
        chosen = device_for(self._device_index(), device)
        use_network(self._address(), one_node)
        init_distributed(
            rank=team.index(self.rank) if team else self.rank,
            world=len(team) or self.world,
            master_addr=address,
            master_port=port,
            device=chosen,
            timeout_s=timeout_s,
            secret=secret,
        )
        self.device, self._joined = str(chosen), True
        if chosen.type == "cuda":
            from workers.device_gauges import DeviceGauges

            self._gauges = DeviceGauges(chosen)
        _log.info(
            "rank %d of pool %s: %s on %s, gloo over %s",
            self.rank,
            self.pool,
            self.device,
            self._address(),
            os.environ.get("GLOO_SOCKET_IFNAME"),
        )
        return self.device

    @reported
    def host_role(
        self,
        role: str,
        worker: str | type,
        settings: Mapping[str, Any],
        context: Mapping[str, Any],
        device_bytes: int | None = None,
        phases: Sequence[str] = (),
    ) -> tuple[str, ...]:
        """Build the worker of `role`, `package.module:Class` or the class itself; what a user should know about it.

        device_bytes, phases: of the pool, the same for all its roles (`placement.pools.X.device_bytes`, `phases.py`).
        """

        def phase(text: str) -> None:
            self._phase = f"{role}: {text}"

        phase("importing")
        made_by: Any = worker
        if isinstance(worker, str):
            module, name = worker.split(":")
            with without_collections():
                made_by = getattr(importlib.import_module(module), name)
        if self._joined and self._memory is None:
            from workers.memory.arbiter import new_arbiter

            self._memory = new_arbiter(self.device, device_bytes, phases, self.pool)
        where = WorkerContext(
            role=role,
            rank=self.rank,
            world=self.world,
            device=self.device,
            peers=self._roles,
            memory=self._memory,
            team=self._team,
            phase=phase,
            hand=self._hand,
            **context,
        )
        self._roles[role] = made_by(context=where, **settings)
        return tuple(getattr(self._roles[role], "remarks", ()))

    def phase(self) -> str:
        """What is being started. Called in a concurrency group of its own, beside `host_role`."""
        return self._phase

    @reported
    def missing(self, files: Mapping[str, int]) -> tuple[str, str] | None:
        """This node's address and the first of `files` (absolute path -> bytes) that is not so here; None: all are."""
        lacks = _first_missing(files)
        return None if lacks is None else (self._address(), lacks)

    def _address(self) -> str:
        """Of this machine, as Ray knows it; a process that is no actor meets nobody else's."""
        if not self.is_actor:
            return "127.0.0.1"
        import ray

        return str(ray.util.get_node_ip_address())

    def _device_index(self) -> int | None:
        """Of the GPU that Ray assigned; the first where there is no Ray to ask."""
        if not self.is_actor:
            return 0
        import ray

        from workers.device import assigned_index

        assigned = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return assigned_index(assigned, os.environ.get("CUDA_VISIBLE_DEVICES"))

    @reported
    def connect(self, role: str, bridge: Bridge) -> None:
        """Let `role` meet the ranks of another pool, that weights go to or come from; all of both pools do."""
        self._roles[role].connect(bridge)

    @reported
    def connect_weights(self, role: str, source: str, target: str, bridge: Bridge | None, staged: int) -> None:
        """Let `role` plan the way of weights from `source` to `target`, one of which it is; all ranks of both do."""
        self._roles[role].connect_weights(source, target, bridge, staged)

    @reported
    def call(self, role: str, op: str, call: Call) -> Reply:
        """Run one op of one role."""
        with self._handing_over(call):
            started = time.perf_counter()
            batches = [pull(given, self.store) for given in call.batches]
            pulled = time.perf_counter()
            given = tuple(batches) if call.others else batches[0]
            worker = self._roles[role]
            with self._looked_at(call, batches, worker=worker) as seen:
                returned = getattr(worker, op)(given, call, **call.kwargs)
                result = returned if isinstance(returned, OpResult) else OpResult(columns=returned)
                seen.result = result
            if self._memory is not None:
                result = replace(result, metrics={**result.metrics, **self._memory.report()})
            return _reply(result, call, batches[0], started, pulled, self.store)

    def meet(self, peers: Mapping[int, Any]) -> None:
        """Rank -> process, for those this one relays calls to; itself among them."""
        self._peers = dict(peers)

    def relay(self, role: str, op: str, calls: Mapping[int, Call], timeout_s: float) -> dict[int, Reply | Failure]:
        """`call` on each rank, as one call of the controller: its cost grows with machines, not with ranks.

        Runs in its own concurrency group, beside `call`. Returns all replies, or what failed as soon as
        something has: the ranks that wait for a failed one are not waited for.
        """
        import ray

        rank_of = {self._peers[rank].call.remote(role, op, call): rank for rank, call in calls.items()}
        replies: dict[int, Reply | Failure] = {}
        left, deadline = list(rank_of), time.monotonic() + timeout_s
        while left:
            ready, left = ray.wait(left, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                return {rank_of[left[0]]: Failure(lost=True, text=f"no reply within {timeout_s:g} s")}
            reply = _received(ready[0])
            if isinstance(reply, Failure):
                return {rank_of[ready[0]]: reply}
            replies[rank_of[ready[0]]] = reply
        return replies

    @contextmanager
    def _handing_over(self, call: Call) -> Iterator[None]:
        if call.pieces is None:
            yield
            return
        self._handing.begin(call.pieces.ticket)
        try:
            yield
        finally:
            self._handing.end()

    def _hand(self, call: Call, piece: int, result: OpResult) -> None:
        """See `WorkerContext.hand`."""
        assert call.pieces is not None, "only such calls are given this"
        now, ticket = time.perf_counter(), call.pieces.ticket
        self._handing.give(ticket, piece, _reply(result, call, Batch({}, call.num_rows), now, now, self.store))

    def handed(self, ticket: str, wait_s: float) -> list[tuple[int, Reply]]:
        """See `Handing.take`. Called in a concurrency group of its own, beside `call`."""
        return self._handing.take(ticket, wait_s)

    def interrupt(self, role: str) -> None:
        """Ask a role that generates to stop where it is. Called in its own concurrency group, beside `call`."""
        self._roles[role].interrupt()

    @reported
    def abandon(self) -> None:
        """Forget what is half done of a step that is given up. Comes after all calls before it: its answer says that
        this process is there, and at nothing."""
        self._handing.forget()
        for worker in self._roles.values():
            if hasattr(worker, "abandon"):
                worker.abandon()

    @reported
    def copy_state(self, role: str, steps_done: int, keeper: Any, timeout_s: float) -> int:
        """Give `keeper`, a process on another node where there is one, a copy of what this rank holds of `role`; its
        bytes."""
        import ray

        copy = self._roles[role].engine.copy_state()
        ray.get(keeper.keep.remote(steps_done, role, self.rank, copy), timeout=timeout_s)
        return int(copy.nbytes)

    @reported
    def put_back(self, role: str, steps_done: int, keeper: Any, timeout_s: float) -> None:
        """Take it back from there."""
        import ray

        self._roles[role].put_back(ray.get(keeper.give.remote(steps_done, role, self.rank), timeout=timeout_s))

    @reported
    def run_host_op(self, op: HostOp[Any, Any], call: Call) -> Reply:
        """Run a pure function of a batch."""
        started = time.perf_counter()
        batches = [pull(given, self.store) for given in call.batches]
        pulled = time.perf_counter()
        settings = dict(call.kwargs)
        if op.draws:
            settings[RANDOM] = np.random.default_rng(seed_of(call.seed, call.step, call.node))
        if not op.missing:
            for batch, reads in zip(batches, op.read_of({**defaults(op.function), **settings}), strict=True):
                refuse_missing(op.name, batch, reads)
        with self._looked_at(call, batches) as seen:
            result: HostResult = as_result(op.function(*batches, **settings))
            made = OpResult(
                columns=result.columns,
                parent=result.parent_for(op.name, op.rows),
                groups=result.groups,
                metrics=result.metrics,
            )
            seen.result = made
        return _reply(made, call, batches[0], started, pulled, self.store)

    @reported
    def run_state_op(self, state: Any, op: str, held: HeldState, call: Call) -> Reply:
        """Run a `State`'s op: (values, batch) -> (values, metrics or a HostResult)."""
        started = time.perf_counter()
        batch = pull(call, self.store)
        function, values = getattr(state, op), dict(values_of(held, self.store))
        pulled = time.perf_counter()
        settings = dict(call.kwargs)
        if RANDOM in inspect.signature(function).parameters:
            settings[RANDOM] = np.random.default_rng(seed_of(call.seed, call.step, call.node))
        spec = function.op_spec
        makes = spec.rows == "new"
        if not makes and not spec.missing:
            refuse_missing(op, batch, spec.columns(spec.reads, {**defaults(function), **settings}))
        with self._looked_at(call, [batch], state=dict(values)) as seen:
            new, returned = function(values, **settings) if makes else function(values, batch, **settings)
            check_values(type(state).__name__, new)
            result = (
                returned if isinstance(returned, HostResult) else HostResult(columns=Batch({}, 0), metrics=returned)
            )
            # First rows that are texts, to be asked about, have no tokens yet; others have those they are written with.
            blank = makes and not any(name in result.columns for name in SEQUENCE)
            made = OpResult(
                columns=result.columns,
                parent=result.parent_for(op, function.op_spec.rows),
                tokens=np.zeros(result.columns.num_rows, np.int64) if blank else None,
                groups=result.groups,
                metrics=result.metrics,
                state=new,
            )
            seen.result = made
        return _reply(made, call, batch, started, pulled, self.store)

    def _looked_at(self, call: Call, batches: Sequence[Batch], **of: Any) -> AbstractContextManager[Seen]:
        return looked_at(call, batches, who=f"{self.pool}-{self.rank}", rank=self.rank, **of)

    @reported
    def save_state(self, held: HeldState, folder: str) -> None:
        """Write a state's values for a checkpoint."""
        write_state(Path(folder), values_of(held, self.store))

    @reported
    def load_state(self, folder: str) -> HeldState:
        """Read what `save_state` wrote."""
        return held_state(read_state(Path(folder)), self.store)

    @reported
    def release_roles(self) -> None:
        """Free what the role workers hold; the process stays in its group, for others."""
        for worker in self._roles.values():
            if hasattr(worker, "close"):
                worker.close()
        self._roles.clear()
        self._memory = None

    def close(self) -> None:
        """Let every role worker free what outlives the process (shared memory, sockets)."""
        self.release_roles()
        if "torch" in sys.modules:
            import torch.distributed

            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        if "workers.engines.training.mesh" in sys.modules:
            from workers.engines.training.mesh import forget_meshes

            forget_meshes()


def pull(given: Given, store: Store) -> Batch:
    """The rows a call needs, straight from the store; a view where one object has them in order."""
    columns = {name: Column(ids) for name, ids in given.ids.items()}
    for fetch in given.fetches:
        parts = [
            Batch({seen: part[inside[k]] for seen, inside in fetch.names.items()}, part.num_rows)
            for k, part in enumerate(store.get(fetch.refs))
        ]
        columns.update(_gather(parts, fetch).items())
    return Batch(columns, given.num_rows)


def _received(ref: Any) -> Reply | Failure:
    import ray

    try:
        reply: Reply | Failure = ray.get(ref)
        return reply
    except ray.exceptions.RayError as error:
        return failure_of_call(error)


def _gather(parts: list[Batch], fetch: Fetch) -> Batch:
    if len(parts) == 1:
        whole = len(fetch.row_of) == parts[0].num_rows and np.array_equal(fetch.row_of, np.arange(parts[0].num_rows))
        return parts[0] if whole else parts[0].take(fetch.row_of)
    taken = [part.take(fetch.row_of[fetch.object_of == k]) for k, part in enumerate(parts)]
    together = Batch.concat(taken)
    order = np.argsort(fetch.object_of, kind="stable")  # where each row of `together` belongs
    if np.array_equal(order, np.arange(len(order))):
        return together
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return together.take(inverse)


def _reply(result: OpResult, call: Call, batch: Batch, started: float, pulled: float, store: Store) -> Reply:
    columns = result.columns
    if call.out:
        columns = columns.rename(**{new: old for old, new in call.out.items()})
    # Under the recipe's names: token ids that it calls otherwise are not the row's own.
    tokens = _tokens_of(columns, batch, result.parent) if result.tokens is None else result.tokens
    groups = _column_groups(columns)
    stored = tuple((names, store.put(columns.select(*names))) for names in groups)
    return Reply(
        stored=stored,
        num_rows=columns.num_rows,
        nbytes=columns.nbytes,
        seconds=time.perf_counter() - started,
        pull_seconds=pulled - started,
        parent=result.parent,
        tokens=tokens,
        groups=result.groups,
        metrics=result.metrics,
        state=None if result.state is None else numbers_in(result.state),
        held=None if result.state is None else held_state(result.state, store).ref,
        interrupted=result.interrupted,
    )


def _tokens_of(written: Batch, batch: Batch, parent: IntArray | None) -> IntArray | None:
    """[B'] prompt and response tokens of rows whose token ids an op has written; None where it has not."""
    if not any(name in written for name in SEQUENCE):
        return None
    tokens = np.zeros(written.num_rows, dtype=np.int64)
    for name in SEQUENCE:
        if name in written:
            tokens += written[name].lengths
        elif name in batch:
            tokens += batch[name].lengths if parent is None else batch[name].lengths[parent]
    return tokens


def _column_groups(columns: Batch) -> list[tuple[str, ...]]:
    """Each ragged column is an object of its own, so that a reader moves only what it reads; the per-row
    columns, a few bytes a row, share one."""
    per_row = tuple(name for name, column in columns.items() if column.offsets is None)
    return [
        *((name,) for name, column in columns.items() if column.offsets is not None),
        *([per_row] if per_row else []),
    ]


def _first_missing(files: Mapping[str, int]) -> str | None:
    deadline = time.monotonic() + _FRESH_S
    for path, size in files.items():
        while True:
            try:
                found = os.stat(path).st_size
            except OSError as error:
                lacks = f"{path} cannot be read: {error.strerror}"
            else:
                lacks = "" if found == size else f"{path} has {found} bytes, and {size} where the run was started"
            if not lacks:
                break
            if time.monotonic() > deadline:
                return lacks
            time.sleep(0.2)
    return None


def _redirect_output(log_file: Path) -> None:
    """Send everything this process prints, native libraries included, to its own file."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(target, stream)
    os.close(target)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
