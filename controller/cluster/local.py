"""A run in one process: the graph, the workers and the numbers of a run on a cluster, without one.

    rlhf-dist run ppo --local        starts in seconds; breakpoint() works in the recipe, in host ops and in losses

    cluster          Ray actors, object store, one process group a pool        engines, rules, sources: the same
    local            objects of this process, their own memory, a group of one      "

Every role has one slot of one pool, with the least `device_bytes` that a pool of the launch has. Generation is the
transformers engine unless the launch says another.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import TracebackType
from typing import Any

from controller.cluster.pool import ClusterError, Pool
from controller.cluster.pool_gauges import PoolGauges
from controller.cluster.replies import Answer
from rlhf_dist.auto_settings import settle
from rlhf_dist.compose import Launch
from rlhf_dist.config import LanguageModelConfig, PlacementConfig, PoolConfig
from rlhf_dist.failure import Failure
from rlhf_dist.machine import local_machine
from rlhf_dist.placement.roles import HOST_POOL

POOL = "local"
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "KINETO_LOG_LEVEL": "6",
}
"""What worker processes of a cluster have too, and less talk: there is no log file to send it to."""


def local_launch(launch: Launch, overrides: Sequence[str], device: str = "auto") -> Launch:
    """The launch with every role in one slot of this process; the plan for a cluster is put aside.

    overrides: what the command line says: an engine for generation that it names is kept. device: see PoolConfig.
    """
    limits = [pool.device_bytes for pool in launch.run.placement.pools.values() if pool.device_bytes is not None]
    pool = PoolConfig(device=device, device_bytes=min(limits, default=None))
    placement = PlacementConfig(pools={POOL: pool}, roles={"default": POOL}, host_processes=1)
    roles = {role: _without_vllm(role, config, overrides) for role, config in launch.roles.items()}
    output = replace(launch.run.output, evaluate_beside=False)  # in one process nothing is beside anything
    here = replace(launch, run=replace(launch.run, placement=placement, output=output), roles=roles)
    return settle(here, local_machine())


def _without_vllm(role: str, config: Any, overrides: Sequence[str]) -> Any:
    said = any(override.lstrip("+").startswith(f"{role}.rollout.engine=") for override in overrides)
    if not isinstance(config, LanguageModelConfig) or said:
        return config
    return replace(config, rollout=replace(config.rollout, engine="transformers"))


@dataclass(frozen=True, eq=False)
class _Done:
    """The reference that a call leaves: it is over when it returns."""

    value: Any


class _Method:
    """A worker's method, called as a Ray actor's is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def options(self, **groups: Any) -> _Method:
        return self

    def remote(self, *args: Any, **kwargs: Any) -> _Done:
        return _Done(self._function(*args, **kwargs))


class _Process:
    """A worker process that is this one."""

    def __init__(self, pool: str) -> None:
        store = import_module("workers.store").LocalStore()
        self.worker = import_module("workers.process").WorkerProcess(pool, 0, 1, None, store)

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self.worker, name))


class LocalReplies:
    """Replies of calls that are over."""

    def ready(self, refs: Sequence[Any], timeout_s: float) -> list[Any]:
        """See Replies."""
        return list(refs)

    def get(self, refs: Sequence[Any], timeout_s: float) -> list[Answer]:
        """See Replies."""
        return [ref.value if isinstance(ref, _Done) else ref for ref in refs]


@dataclass
class Local:
    """A context manager that gives pools of one process, as `Cluster` does; leaving it frees what they hold."""

    timeout_s: float
    """Of collectives."""
    pools: dict[str, Pool] = field(default_factory=dict)
    replies: LocalReplies = field(default_factory=LocalReplies)
    watch: None = None
    """There is no other process to watch."""
    _gauges: PoolGauges = field(init=False)

    def __post_init__(self) -> None:
        self._gauges = PoolGauges(self.replies)

    def __enter__(self) -> Local:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import_module("transformers.utils.logging").disable_progress_bar()
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self.pools):
            self.end_pool(name)

    def metrics(self) -> dict[str, float]:
        """What its GPU was at; there is no object store to watch."""
        return self._gauges.metrics(self.pools)

    def begin_pool(self, name: str, pool: PoolConfig, team: int, modules: Sequence[str]) -> None:
        """There is nothing to wait for: what the pool's roles need is imported."""
        _Process(name).worker.import_ahead(modules)

    def await_processes(self) -> None:
        """There are no others."""

    def add_pool(self, name: str, pool: PoolConfig, team: int = 0) -> Pool:
        """This process as a pool of one, in a process group of one. Raises ClusterError where it cannot be."""
        process = _Process(name)
        opened = process.worker.open_port()
        device = (
            opened if isinstance(opened, Failure) else process.worker.join(*opened, pool.device, True, self.timeout_s)
        )
        if isinstance(device, Failure):
            raise ClusterError(f"this process could not be a worker: {device.text}")
        self.pools[name] = Pool(name, (process,), devices=(device,), pids=(os.getpid(),))
        return self.pools[name]

    def change_pool(self, name: str, pool: PoolConfig, dead: Collection[int]) -> Pool:
        """There is one process. Raises ClusterError."""
        raise ClusterError("a local run has one process, which no pool can grow or shrink beyond; run on a cluster")

    def end_pool(self, name: str) -> None:
        """Free what a pool's workers hold."""
        pool = self.pools.pop(name, None)
        for process in pool.processes if pool else ():
            with suppress(Exception):
                process.worker.close()

    def keeper(self, node_id: str) -> Any:
        """There is no other process to keep anything. Raises ClusterError."""
        raise ClusterError("a local run has no other process to keep copies; recovery.memory_every needs a cluster")

    def end_keepers(self) -> None:
        """There are none."""

    def add_host_pool(self) -> Pool:
        """This process, for what needs no device."""
        self.pools[HOST_POOL] = Pool(HOST_POOL, (_Process(HOST_POOL),), pids=(os.getpid(),))
        return self.pools[HOST_POOL]
