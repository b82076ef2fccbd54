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
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from controller.cluster.failure_text import explained
from controller.cluster.object_store import ObjectStore
from controller.cluster.pool import BEATS, RELAYS, SIGNALS, ClusterError, NoRoom, Pool
from controller.cluster.ray_address import address_to_join, prepare_own
from controller.cluster.reaper import Reaper
from controller.cluster.replies import RayReplies
from controller.cluster.store_room import remark_on_room
from controller.cluster.user_files import send_user_files_by_value
from controller.cluster.watch import Watch
from controller.cluster.worker_environment import is_sent
from rlhf_dist.secret_settings import kept_variables, plain_variables
from rlhf_dist.config import PoolConfig, RayConfig
from rlhf_dist.failure import Failure, failure_of_call, text_of
from rlhf_dist.placement.roles import HOST_POOL

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_ARENA_MAX": "1"}
"""What tells glibc to keep freed memory."""
PROCESS_PATH = ("workers.process", "WorkerProcess")
KEEPER_PATH = ("workers.keeper", "Keeper")


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
    _groups: dict[str, Any] = field(default_factory=dict)
    """Pool -> its placement group."""
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
        remark = remark_on_room(self.config.object_store_bytes)
        self._own, self._set_aside, self._reaper = True, prepare_own(), Reaper()
        with self._reaper.marking():
            self._init(
                "could not start a cluster on this machine",
                address="local",
                num_cpus=self.slots + self.host_processes + 1,
                object_store_memory=self.config.object_store_bytes,
                include_dashboard=False,
                # Ray would start a process a CPU ahead; ours have an environment of their own and cannot use them.
                _system_config={"prestart_worker_first_driver": False},
                **options,
            )
        self._reaper.tell(_session_folder())
        aside = f"; RAY_ADDRESS={self._set_aside} is left alone, ray.address=auto joins it" if self._set_aside else ""
        self.about = f"in a Ray cluster of its own{aside}{f'; {remark}' if remark else ''}"

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

    def add_pool(self, name: str, pool: PoolConfig) -> Pool:
        """Reserve the slots, start their processes and join them into one process group.

        With `pool.nodes`, ranks are in node order and every node has as many. Raises ClusterError when the slots
        are not free within `ready_timeout_s`.
        """
        gpus = self._gpus_per_slot(pool)
        bundle: dict[str, float] = {"CPU": 1.0, **({"GPU": 1.0} if gpus else {})}
        if pool.nodes:
            whole = {what: amount * pool.slots for what, amount in bundle.items()}
            group = self._reserve(name, [whole] * pool.nodes, "STRICT_SPREAD")
            processes = self._start(name, pool.slots * pool.nodes, group, gpus, per_bundle=pool.slots)
        else:
            group = self._reserve(name, [bundle] * pool.slots)
            processes = self._start(name, pool.slots, group, gpus)
        waiting = self.config.ready_timeout_s
        whereabouts = self._get(name, [process.pid.remote() for process in processes], waiting)
        node_ids = tuple(node for _, node in whereabouts)
        address, port, secret = self._get(name, [processes[0].open_port.remote()], waiting)[0]
        devices = self._get(
            name,
            [
                process.join.remote(address, port, secret, pool.device, len(set(node_ids)) == 1, self.config.call_timeout_s)
                for process in processes
            ],
            waiting + 60,
        )
        leads = self._introduce(name, processes, node_ids)
        made = Pool(
            name,
            tuple(processes),
            tuple(devices),
            node_ids,
            tuple(pid for pid, _ in whereabouts),
            leads,
            self._logs(name, len(processes)),
        )
        self.pools[name] = made
        self.watch.add(made)
        return made

    def metrics(self) -> dict[str, float]:
        """What its object store holds, every few seconds; nothing in between."""
        return {} if self._store is None else self._store.metrics()

    def add_host_pool(self) -> Pool:
        """Start the CPU processes for sources, rule rewards and host ops."""
        group = self._reserve(HOST_POOL, [{"CPU": 1.0}] * self.host_processes)
        processes = self._start(HOST_POOL, self.host_processes, group, gpus=0)
        whereabouts = self._get(HOST_POOL, [process.pid.remote() for process in processes], self.config.ready_timeout_s)
        pids, nodes = tuple(pid for pid, _ in whereabouts), tuple(node for _, node in whereabouts)
        made = Pool(HOST_POOL, tuple(processes), node_ids=nodes, pids=pids, logs=self._logs(HOST_POOL, len(processes)))
        self.pools[HOST_POOL] = made
        self.watch.add(made)
        return made

    def end_pool(self, name: str) -> None:
        """End one pool's processes at once, whatever they are at, and free its slots; also one that is starting."""
        pool, group = self.pools.pop(name, None), self._groups.pop(name, None)
        self.watch.remove(name)
        for process in pool.processes if pool else ():
            with contextlib.suppress(Exception):
                ray.kill(process)
        if group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(group)

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
        for keeper in self._keepers.values():
            with contextlib.suppress(Exception):
                ray.kill(keeper)
        self._keepers.clear()

    def close(self, grace_s: float = 5.0) -> None:
        """End every process: ask first, then kill, then leave Ray (and end it, if it was started here)."""
        head_lost = self.watch.head_lost
        self.watch.close()
        if head_lost:  # whatever is asked of it waits for a minute, after which Ray ends this process
            self._reap()
        elif ray.is_initialized():
            self._end_processes(grace_s)
        self.pools.clear()
        self._groups.clear()
        if self._started and ray.is_initialized():
            ray.shutdown()
        self._reap()
        self._restore_address()

    def _end_processes(self, grace_s: float) -> None:
        processes = [process for pool in self.pools.values() for process in pool.processes]
        with contextlib.suppress(Exception):
            ray.wait([p.close.remote() for p in processes], num_returns=len(processes), timeout=grace_s)
        for process in processes:
            with contextlib.suppress(Exception):
                ray.kill(process)
        self.end_keepers()
        for group in list(self._groups.values()):
            with contextlib.suppress(Exception):
                remove_placement_group(group)

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

    @property
    def _threads(self) -> int:
        """Threads of a rank: the cores of this machine divided among all slots, or 1 on a cluster we did not start."""
        return max(1, (os.cpu_count() or 1) // max(self.slots, 1)) if self._own else 1

    def _reserve(self, name: str, bundles: list[dict[str, float]], strategy: str = "PACK") -> Any:
        group = placement_group(bundles, strategy=strategy, name=f"rlhf-dist-{name}-{os.getpid()}-{time.time_ns()}")
        self._groups[name] = group
        deadline = time.monotonic() + self.config.ready_timeout_s
        if not group.wait(timeout_seconds=max(0.1, deadline - time.monotonic())):
            raise NoRoom(
                f"pool {name!r} needs {len(bundles)} {'nodes with' if strategy == 'STRICT_SPREAD' else 'slots of'} "
                f"{_resources(bundles[0])}, not free within "
                f"{self.config.ready_timeout_s:g} s; the nodes have free: {_free_resources()}. "
                f"Use fewer slots, add nodes, or end the job that holds them"
            )
        return group

    def _logs(self, pool: str, count: int) -> tuple[str, ...]:
        if self.log_folder is None:
            return ()
        return tuple(str((self.log_folder / f"{pool}-{rank}.log").resolve()) for rank in range(count))

    def _start(self, pool: str, count: int, group: Any, gpus: int, per_bundle: int = 1) -> list[Any]:
        module, name = PROCESS_PATH
        remote = worker_actor(getattr(importlib.import_module(module), name))
        logs = self._logs(pool, count)
        variables = kept_variables(self.config.worker_env)  # not with the others, which Ray shows and logs
        return [
            remote.options(
                num_cpus=1,
                num_gpus=gpus,
                max_restarts=0,
                runtime_env={"env_vars": _environment(gpus, self._threads, plain_variables(self.config.worker_env))},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=rank // per_bundle
                ),
            ).remote(
                pool, rank, count, logs[rank] if logs else None, folder=os.getcwd(), variables=variables
            )
            for rank in range(count)
        ]

    def _introduce(self, name: str, processes: list[Any], node_ids: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Tell the first rank on each machine of the others there."""
        together: dict[str, list[int]] = {}
        for rank, node in enumerate(node_ids):
            together.setdefault(node, []).append(rank)
        leads = tuple(tuple(ranks) for ranks in together.values())
        meeting = [processes[ranks[0]].meet.remote({rank: processes[rank] for rank in ranks}) for ranks in leads]
        self._get(name, meeting, self.config.ready_timeout_s)
        return leads

    def _get(self, pool: str, refs: list[Any], timeout_s: float) -> list[Any]:
        logs = f"; its log is in {self.log_folder}" if self.log_folder else ""
        try:
            found = list(ray.get(refs, timeout=timeout_s))
        except ray.exceptions.GetTimeoutError:
            raise ClusterError(f"processes of pool {pool!r} did not start within {timeout_s:g} s{logs}") from None
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"a process of pool {pool!r} did not start: {failure_of_call(error).text}{logs}"
            ) from error
        for rank, answer in enumerate(found):
            if isinstance(answer, Failure):
                log = self._logs(pool, len(found))[rank] if self.log_folder else None
                raise ClusterError(f"pool {pool!r}, rank {rank}, did not start: {explained(answer, log)}")
        return found


def _session_folder() -> str:
    """Of the cluster that this process has started."""
    from ray._private import worker

    node: Any = worker._global_node
    return str(node.get_session_dir_path())


def worker_actor(kind: type) -> Any:
    """A worker process class as Ray actor: a thread that works, one for signals, one that relays, one that answers."""
    threads: Any = {"concurrency_groups": {SIGNALS: 1, RELAYS: 1, BEATS: 1}}
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
    }
    here = {name: value for name, value in os.environ.items() if name in defaults or is_sent(name)}
    return {**defaults, **here, **own}


def _resources(bundle: Mapping[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in bundle.items())


def _free_resources() -> str:
    from ray._private.state import available_resources_per_node

    lines = []
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    for node, free in available_resources_per_node().items():
        lines.append(f"{names.get(node, node)}: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU")
    return "; ".join(lines) or "no node is alive"
