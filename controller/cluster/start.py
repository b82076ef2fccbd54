"""The Ray cluster: connect or start, reserve slots as placement groups, start one process per slot, clean up.

    Cluster -- placement group per pool --> Pool(processes 0..n-1, one process group)
           \\- host pool (CPU helpers, no process group)

Every wait is bounded. A request that cannot be met says what is missing on which node.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from controller.cluster.failure_text import explained
from controller.cluster.head_services import without_head_services
from controller.cluster.object_store import ObjectStore
from controller.cluster.pool import BEATS, HANDED, RELAYS, SIGNALS, ClusterError, LostInStart, Pool
from controller.cluster.pool_gauges import PoolGauges
from controller.cluster.ray_address import address_to_join, prepare_own
from controller.cluster.reaper import Reaper
from controller.cluster.replies import RayReplies
from controller.cluster.reservations import Place, Reservations
from controller.cluster.store_room import remark_on_room, temporary_folder
from controller.cluster.user_files import send_user_files_by_value
from controller.cluster.watch import Watch
from controller.cluster.worker_environment import is_sent
from rlhf_dist.config import PoolConfig, RayConfig
from rlhf_dist.failure import Failure, failure_of_call, text_of
from rlhf_dist.placement.roles import HOST_POOL
from rlhf_dist.secret_settings import kept_variables, plain_variables

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_ARENA_MAX": "1"}
"""What tells glibc to keep freed memory."""
PROCESS_PATH = ("workers.process", "WorkerProcess")
ROOM_S = 20.0
"""Longest wait for slots that a pool grows into: the run stands still meanwhile, and can go on without them. Slots of
the dead are waited for as at the start, `ray.ready_timeout_s`: it cannot go on without those."""
KEEPER_PATH = ("workers.keeper", "Keeper")


@dataclass(frozen=True)
class _Begun:
    """Processes of a pool that have been started, by rank."""

    places: Mapping[int, Place]
    processes: Mapping[int, Any]
    whereabouts: Mapping[int, Any]
    """References to process id and node, the first answer of each."""
    imports: Mapping[int, Any]
    """References to its imports, which every other call waits for."""


@dataclass
class Cluster:
    """A context manager around Ray; leaving it ends everything it started."""

    config: RayConfig
    slots: int
    """Slots all pools need together."""
    host_processes: int
    log_folder: Path | None = None
    pools: dict[str, Pool] = field(default_factory=dict)
    about: str = ""
    """Which cluster it is, once entered."""
    replies: RayReplies = field(default_factory=RayReplies)
    """How calls to its processes are waited for."""
    watch: Watch = field(init=False)
    """Finds which of its processes is lost."""
    _gauges: PoolGauges = field(init=False)
    _reserved: Reservations = field(init=False)
    """Slots of its pools."""
    _begun: dict[str, _Begun] = field(default_factory=dict)
    """Pool -> its processes, until it is added."""
    _modules: dict[str, Sequence[str]] = field(default_factory=dict)
    """Pool -> what its processes import ahead."""
    _keepers: dict[str, Any] = field(default_factory=dict)
    """Node -> its process that keeps copies of what ranks on another hold."""
    _started: bool = False
    _own: bool = False
    """Nobody else's: its ranks may use all cores."""
    _reaper: Reaper | None = None
    """Ends a cluster of its own, should this process be killed."""
    _store: ObjectStore | None = None
    _set_aside: str | None = None
    """RAY_ADDRESS, while a cluster of its own runs."""

    def __post_init__(self) -> None:
        self.watch = Watch(self.replies, self.log_folder)
        self._gauges = PoolGauges(self.replies)
        self._reserved = Reservations(self.config.ready_timeout_s)

    def __enter__(self) -> Cluster:
        send_user_files_by_value()
        self._connect()
        try:
            self._store = ObjectStore()  # What is spilled counts from here.
        except BaseException:
            self.close()
            raise
        return self

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if ray.is_initialized():
            self.about = "in the Ray cluster that this process is connected to"
            self._own = self.config.address is None
            return
        logging.getLogger("ray").setLevel(logging.ERROR)
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        address = address_to_join(self.config.address)
        if address is not None:
            self._init(f"could not join the cluster at {address}", address=address, **options)
            self.about = f"in the Ray cluster at {address}"
            self._check_size(address)
            return
        remark = remark_on_room(self.config.object_store_bytes, temporary_folder())
        try:
            self._start_own(**options)
        except ClusterError as error:
            if "timed out" not in str(error):
                raise
            self._start_own(**options)  # Ray gives its own processes 30 s, which a busy machine may not be able to keep
        aside = f"; RAY_ADDRESS={self._set_aside} is left alone, ray.address=auto joins it" if self._set_aside else ""
        self.about = f"in a Ray cluster of its own{aside}{f'; {remark}' if remark else ''}"

    def _start_own(self, **options: Any) -> None:
        self._own, self._set_aside, self._reaper = True, prepare_own(), Reaper()
        with self._reaper.marking(), without_head_services():
            self._init(
                "could not start a cluster on this machine",
                address="local",
                num_cpus=self.slots + self.config.spare_slots + self.host_processes + 1,
                object_store_memory=self.config.object_store_bytes,
                include_dashboard=False,
                _temp_dir=str(temporary_folder() / "ray"),
                # Ray would start a process a CPU ahead; ours have an environment of their own and cannot use them.
                _system_config={"prestart_worker_first_driver": False},
                **options,
            )
        self._reaper.tell(_session_folder())

    def _init(self, failing: str, **options: Any) -> None:
        # Ray puts its own debugger into the environment: in this process breakpoint() stays what it was.
        debugger = os.environ.get("PYTHONBREAKPOINT")
        try:
            ray.init(**options)
        except BaseException as error:
            self._restore_address()
            self._reap()
            if not isinstance(error, Exception):
                raise
            raise ClusterError(f"Ray {failing}: {text_of(error)}") from error
        finally:
            os.environ.pop("PYTHONBREAKPOINT", None)
            if debugger is not None:
                os.environ["PYTHONBREAKPOINT"] = debugger
        self._started = True

    def _restore_address(self) -> None:
        if self._set_aside is not None:
            os.environ["RAY_ADDRESS"] = self._set_aside

    def _check_size(self, address: str) -> None:
        """Raise ClusterError where the whole cluster is too small, before anything starts on it."""
        needed, there = self.slots + self.host_processes, ray.cluster_resources().get("CPU", 0)
        if there < needed:
            ray.shutdown()
            raise ClusterError(
                f"the placement needs {self.slots} slots and {self.host_processes} host processes, a CPU each, and the "
                f"cluster at {address} has {there:g} CPU in all; use fewer slots (placement.pools.*.slots, "
                f"placement.host_processes), or add nodes first"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin_pool(self, name: str, pool: PoolConfig, team: int, modules: Sequence[str]) -> None:
        """Reserve the slots of a pool that `add_pool` or `add_host_pool` then adds, and start its processes, each of
        which imports `modules` while others start. Raises ClusterError when slots are not free in time."""
        self._modules[name] = modules
        self._begun[name] = self._begin(name, pool, team)

    def await_processes(self) -> None:
        """Wait until all processes that were begun have answered. Raises ClusterError."""
        for name, begun in self._begun.items():
            self._get(name, begun.whereabouts, self.config.ready_timeout_s)

    def add_pool(self, name: str, pool: PoolConfig, team: int = 0) -> Pool:
        """Reserve the slots, start their processes and join them into one process group, or one for each `team`
        consecutive ranks, which can come and go (`change_pool`).

        With `pool.nodes`, ranks are in node order and every node has as many. Raises ClusterError when the slots
        are not free within `ready_timeout_s`.
        """
        begun = self._begun.pop(name, None) or self._begin(name, pool, team)
        return self._fill(Pool(name, (), team=team), pool, begun, len(begun.processes))

    def _begin(self, name: str, pool: PoolConfig, team: int) -> _Begun:
        host = name == HOST_POOL
        size = self.host_processes if host else pool.slots * max(pool.nodes, 1)
        places = self._reserved.take(name, pool, team, range(size), {"CPU": 1.0} if host else self._slot(pool))
        return self._start(name, size, places, 0 if host else self._gpus_per_slot(pool))

    def change_pool(self, name: str, pool: PoolConfig, dead: Collection[int]) -> Pool:
        """Give a pool of teams the size that `pool` says: ranks at its end are ended or added, and `dead` ones
        replaced, wherever there is room; all others keep their processes. Raises NoRoom before anything has changed,
        ClusterError when a process does not come up, which leaves the pool with those it had."""
        old, size = self.pools[name], pool.slots * max(pool.nodes, 1)
        _kill(old.processes[rank] for rank in dead)
        again = [rank for rank in range(size) if rank in dead or rank >= old.size]
        places = {rank: old.bundles[rank] for rank in again if pool.nodes}  # others of their nodes are in them too
        if not places:
            # A process that is stopped does not hear that it is to end; without its reservation it is killed.
            gone = {old.bundles[rank][0] for rank in dead}
            self._reserved.release(name, {group for group, _ in old.bundles} - gone)
            places = self._reserved.take(name, pool, old.team, again, self._slot(pool), None if dead else ROOM_S)
        made = self._fill(old, pool, self._start(name, size, places, self._gpus_per_slot(pool)), size)
        _kill(old.processes[size:])
        self._reserved.release(name, {group for group, _ in made.bundles})
        return made

    def _fill(self, old: Pool, pool: PoolConfig, begun: _Begun, size: int) -> Pool:
        """`old` with `size` ranks, those that were begun in place of its own."""
        name, started, places = old.name, begun.processes, begun.places
        try:
            at = self._get(name, begun.whereabouts, self.config.ready_timeout_s)
            self._get(name, begun.imports, self.config.ready_timeout_s + self.config.call_timeout_s)
            devices = self._meet(old, pool, started, {rank: node for rank, (_, node) in at.items()}, size)
        except BaseException:
            _kill(started.values())
            self._reserved.release(name, {group for group, _ in old.bundles})
            raise

        def filled(before: Sequence[Any], new: Mapping[int, Any]) -> tuple[Any, ...]:
            return tuple(new[rank] if rank in new else before[rank] for rank in range(size))

        processes = filled(old.processes, started)
        node_ids = filled(old.node_ids, {rank: node for rank, (_, node) in at.items()})
        made = Pool(
            name,
            processes,
            filled(old.devices, devices),
            node_ids,
            filled(old.pids, {rank: pid for rank, (pid, _) in at.items()}),
            self._introduce(name, processes, node_ids),
            old.team,
            filled(old.bundles, places),
            self._logs(name, size),
        )
        self.watch.remove(name)
        self.pools[name] = made
        self.watch.add(made)
        return made

    def _meet(
        self, old: Pool, pool: PoolConfig, started: Mapping[int, Any], nodes: Mapping[int, str], size: int
    ) -> dict[int, Any]:
        """Join these processes into their process groups, at the first rank of each; rank -> device."""
        waiting, limit_s = self.config.ready_timeout_s, self.config.call_timeout_s
        teams = {rank: _team(old.team, rank) or tuple(range(size)) for rank in started}
        firsts = dict.fromkeys(team[0] for team in teams.values())
        ports = self._get(old.name, {rank: started[rank].open_port.remote() for rank in firsts}, waiting)
        joining = {
            rank: process.join.remote(
                *ports[teams[rank][0]],
                pool.device,
                len({nodes[other] for other in teams[rank]}) == 1,
                limit_s,
                _team(old.team, rank),
            )
            for rank, process in started.items()
        }
        return self._get(old.name, joining, waiting + 60)

    def metrics(self) -> dict[str, float]:
        """What its object store holds, every few seconds, and nothing in between; what its GPUs were at."""
        stored = {} if self._store is None else self._store.metrics()
        return {**stored, **self._gauges.metrics(self.pools)}

    def add_host_pool(self) -> Pool:
        """Start the CPU processes for sources, rule rewards and host ops."""
        begun = self._begun.pop(HOST_POOL, None) or self._begin(HOST_POOL, PoolConfig(), 0)
        whereabouts = self._get(HOST_POOL, begun.whereabouts, self.config.ready_timeout_s).values()
        pids, nodes = tuple(pid for pid, _ in whereabouts), tuple(node for _, node in whereabouts)
        processes, logs = tuple(begun.processes.values()), self._logs(HOST_POOL, self.host_processes)
        made = Pool(HOST_POOL, processes, node_ids=nodes, pids=pids, logs=logs)
        self.pools[HOST_POOL] = made
        self.watch.add(made)
        return made

    def end_pool(self, name: str) -> None:
        """End one pool's processes at once, whatever they are at, and free its slots; also one that is starting."""
        pool, begun = self.pools.pop(name, None), self._begun.pop(name, None)
        self.watch.remove(name)
        _kill((*(pool.processes if pool else ()), *(begun.processes.values() if begun else ())))
        self._reserved.release(name)

    def keeper(self, node_id: str) -> Any:
        """A process on the next node of the pools' (on the same, where there is one) that keeps copies for this one."""
        nodes = list(dict.fromkeys(node for pool in self.pools.values() for node in pool.node_ids))
        where = nodes[(nodes.index(node_id) + 1) % len(nodes)]
        if where not in self._keepers:
            module, name = KEEPER_PATH
            pinned = NodeAffinitySchedulingStrategy(node_id=where, soft=False)
            kind = ray.remote(getattr(importlib.import_module(module), name))
            self._keepers[where] = kind.options(num_cpus=0, scheduling_strategy=pinned).remote()
        return self._keepers[where]

    def end_keepers(self) -> None:
        """End those processes."""
        _kill(self._keepers.values())
        self._keepers.clear()

    def close(self, grace_s: float = 5.0) -> None:
        """End every process: ask first, then kill, then leave Ray (and end it, if it was started here)."""
        if ray.is_initialized() and not self.watch.head_lost:
            self._end_processes(grace_s)
        if self.watch.head_lost:  # whatever is asked of it waits for a minute, after which Ray ends this process
            self._reap()
        self.watch.close()
        self.pools.clear()
        self._reserved.forget()
        if self._started and ray.is_initialized():
            ray.shutdown()
        self._reap()
        self._restore_address()

    def _end_processes(self, grace_s: float) -> None:
        processes = [process for pool in self.pools.values() for process in pool.processes]
        with contextlib.suppress(Exception):
            ray.wait([p.close.remote() for p in processes], num_returns=len(processes), timeout=grace_s)
        _kill((*processes, *(one for begun in self._begun.values() for one in begun.processes.values())))
        self._begun.clear()
        self.end_keepers()
        if self._reaper is None and not self.watch.head_lost:  # a Ray that ends with us needs nothing back
            self._reserved.release_all()

    def _reap(self) -> None:
        reaper, self._reaper = self._reaper, None
        if reaper is not None:
            reaper.end()

    def _gpus_per_slot(self, pool: PoolConfig) -> int:
        if pool.device == "cpu":
            return 0
        gpus = ray.cluster_resources().get("GPU", 0)
        if pool.device == "cuda" and not gpus:
            raise ClusterError("placement asks for device=cuda, but the cluster has no GPU; use device=auto or cpu")
        return int(gpus > 0)

    def _slot(self, pool: PoolConfig) -> dict[str, float]:
        """Resources of a slot."""
        return {"CPU": 1.0, **({"GPU": 1.0} if self._gpus_per_slot(pool) else {})}

    @property
    def _threads(self) -> int:
        """Threads of a rank: the cores of this machine divided among all slots, or 1 on a cluster we did not start."""
        return max(1, (os.cpu_count() or 1) // max(self.slots, 1)) if self._own else 1

    def _logs(self, pool: str, count: int) -> tuple[str, ...]:
        if self.log_folder is None:
            return ()
        return tuple(str((self.log_folder / f"{pool}-{rank}.log").resolve()) for rank in range(count))

    def _start(self, pool: str, size: int, places: Mapping[int, Place], gpus: int) -> _Begun:
        """New processes, each in its place."""
        module, name = PROCESS_PATH
        remote = worker_actor(getattr(importlib.import_module(module), name))
        logs = self._logs(pool, size)
        # Two ways: what the runtime environment holds, Ray shows and logs.
        plain, kept = plain_variables(self.config.worker_env), kept_variables(self.config.worker_env)
        processes = {
            rank: remote.options(
                num_cpus=1,
                num_gpus=gpus,
                max_restarts=0,
                runtime_env={"env_vars": _environment(gpus, self._threads, plain)},
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            ).remote(pool, rank, size, logs[rank] if logs else None, folder=os.getcwd(), variables=kept)
            for rank, (group, bundle) in places.items()
        }
        whereabouts = {rank: process.pid.remote() for rank, process in processes.items()}
        modules = list(self._modules.get(pool, ()))
        imports = {rank: one.import_ahead.remote(modules) for rank, one in processes.items()} if modules else {}
        return _Begun(places, processes, whereabouts, imports)

    def _introduce(self, name: str, processes: Sequence[Any], node_ids: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Tell the first rank on each machine of the others there."""
        together: dict[str, list[int]] = {}
        for rank, node in enumerate(node_ids):
            together.setdefault(node, []).append(rank)
        leads = tuple(tuple(ranks) for ranks in together.values())
        meeting = {
            ranks[0]: processes[ranks[0]].meet.remote({rank: processes[rank] for rank in ranks}) for ranks in leads
        }
        self._get(name, meeting, self.config.ready_timeout_s)
        return leads

    def _get(self, pool: str, refs: Mapping[int, Any], timeout_s: float) -> dict[int, Any]:
        """Rank -> what it answers."""
        logs = f"; its log is in {self.log_folder}" if self.log_folder else ""
        try:
            found = dict(zip(refs, ray.get(list(refs.values()), timeout=timeout_s), strict=True))
        except ray.exceptions.GetTimeoutError:
            raise ClusterError(f"processes of pool {pool!r} did not start within {timeout_s:g} s{logs}") from None
        except ray.exceptions.RayError as error:
            failure = failure_of_call(error)
            kind = LostInStart if failure.lost else ClusterError
            raise kind(f"a process of pool {pool!r} did not start: {failure.text}{logs}") from error
        for rank, answer in found.items():
            if isinstance(answer, Failure):
                log = self._logs(pool, rank + 1)[rank] if self.log_folder else None
                raise ClusterError(f"pool {pool!r}, rank {rank}, did not start: {explained(answer, log)}")
        return found


def _team(size: int, rank: int) -> tuple[int, ...]:
    """The ranks that are in a process group with this one; empty where there is one for the pool."""
    first = rank - rank % size if size else 0
    return tuple(range(first, first + size))


def _kill(processes: Iterable[Any]) -> None:
    for process in processes:
        with contextlib.suppress(Exception):
            ray.kill(process)


def _session_folder() -> str:
    """Of the cluster that this process has started."""
    from ray._private import worker

    node: Any = worker._global_node
    return str(node.get_session_dir_path())


def worker_actor(kind: type) -> Any:
    """A worker process class as Ray actor: a thread that works, and others for signals, relays, beats, and what is
    handed over: a question about a call that has not begun must not hold up one about the call under way."""
    threads: Any = {"concurrency_groups": {SIGNALS: 1, RELAYS: 1, HANDED: 4, BEATS: 1}}
    return ray.remote(**threads)(kind)


def _environment(gpus: int, threads: int, own: Mapping[str, str]) -> dict[str, str]:
    """Environment of worker processes on any node, each of which computes with `threads` threads.

    own: `ray.worker_env`, which goes before this process's environment, and that before the defaults.
    """
    defaults = {
        # A CPU rank frees and takes hundreds of megabytes every step; keeping them saves the page faults that
        # were a third of a 135M model's training step. Calls run in threads of the actor, whose own arenas
        # would give memory back all the same: all use the main one.
        **({} if gpus else KEEP_MEMORY),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "KINETO_LOG_LEVEL": "6",  # below it, a line for every start and stop of torch.profiler
    }
    here = {name: value for name, value in os.environ.items() if name in defaults or is_sent(name)}
    return {**defaults, **here, **own}
