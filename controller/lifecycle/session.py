"""A session: the pools and worker groups of one launch, up and ready.

    Launch -- placement --> pools --> processes --> role workers --> WorkerGroup per role
                                                        actor --- weights ---> actor.rollout, in another pool

Rule rewards and sources live on the host pool's CPU processes; everything with a model lives on a slot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

from controller.cluster.blame import FirstCause
from controller.cluster.failure_text import explained, logs_of
from controller.cluster.pool import SIGNALS, ClusterError, LostInStart, Pool, machines
from controller.cluster.replies import Replies
from controller.cluster.shared_files import check_files_are_shared
from controller.cluster.watch import Waited, Watch
from controller.execution.executor import Finished
from controller.execution.looking import Looking
from controller.execution.ray_runner import RayRunner
from controller.execution.replicas import Replicas
from controller.execution.worker_group import WorkerGroup
from rlhf_dist.compose import Launch
from rlhf_dist.config import LanguageModelConfig, PoolConfig, SourceConfig
from rlhf_dist.data.of_launch import tokenizer_of, tokenizers
from rlhf_dist.dataflow.graph import Dataflow, Node
from rlhf_dist.dataflow.passes import reshard_node
from rlhf_dist.dispatch import ONE_TO_ALL
from rlhf_dist.failure import Failure, FailureKind, failure_of_call
from rlhf_dist.held_out import HELDOUT, held_out_fields
from rlhf_dist.output_checks import frozen_folders
from rlhf_dist.placement.phases import phases_of
from rlhf_dist.placement.roles import HOST_POOL, only_generates, pool_size, resolved, rollout_of
from rlhf_dist.role_kinds import has_training_engine, meshes_of, modules_of, role_with_base, worker_of
from rlhf_dist.roles import OpSpec, State
from rlhf_dist.wire import Bridge, HeldState

GROUP_BITS = 48
"""Group ids of a recipe's k-th source begin at k times two to this."""
SOURCE_WORKER = "workers.source:SourceWorker"
SYNC_SHARE = 0.8
"""Of what the controller waits for a call: a weight sync takes less, so that ranks say who is missing."""


class Processes(Protocol):
    """Where a session's processes come from: a Ray cluster, or the process of a local run."""

    pools: dict[str, Pool]

    @property
    def replies(self) -> Replies:
        """How calls to them are waited for."""
        ...

    @property
    def watch(self) -> Watch | None:
        """What finds the process that is lost, where there are several."""
        ...

    def begin_pool(self, name: str, pool: PoolConfig, team: int, modules: Sequence[str]) -> None:
        """Start what will be a pool's processes, and have them import `modules`; nothing is waited for but slots."""
        ...

    def await_processes(self) -> None:
        """Wait until all that were begun answer."""
        ...

    def add_pool(self, name: str, pool: PoolConfig, team: int = 0) -> Pool:
        """Processes that share a process group, or `team` consecutive ones each."""
        ...

    def change_pool(self, name: str, pool: PoolConfig, dead: Collection[int]) -> Pool:
        """Replace `dead` ranks of a pool of teams, and give it another size; the others keep their processes."""
        ...

    def add_host_pool(self) -> Pool:
        """CPU processes for sources, rules and host ops."""
        ...

    def end_pool(self, name: str) -> None:
        """End a pool's processes, whatever they are at, and give back its slots."""
        ...

    def keeper(self, node_id: str) -> Any:
        """Who keeps copies of what ranks on that node hold."""
        ...

    def end_keepers(self) -> None:
        """End all of those; the next `keeper` starts new ones."""
        ...


_Starting = tuple[WorkerGroup, dict[int, Any]]
"""A group, and the references to what its ranks answer; those only that are asked."""


@dataclass
class Session:
    """Worker groups of a launch, and calls to them."""

    launch: Launch
    cluster: Processes
    groups: dict[str, WorkerGroup]
    states: dict[str, State]
    shifts: Mapping[str, int] = field(default_factory=dict)
    """Source parameter -> see `PromptSource.emit`."""
    only: Collection[str] | None = None
    """Groups that are hosted, for a person who looks at one node (`replay.py`); None: all."""

    def runner(
        self,
        dataflow: Dataflow | None,
        numbers: Mapping[str, Mapping[str, float]],
        *,
        beside: bool = False,
        limit_s: float | None = None,
        check: Callable[[], None] | None = None,
        replicas: Replicas | None = None,
        looking: Looking | None = None,
        **sources: str,
    ) -> RayRunner:
        """A runner over these groups. `sources`: source parameter -> group that feeds it, where they differ.
        beside, check, replicas, looking: see RayRunner. limit_s: longest a call may take, where that is not
        ray.call_timeout_s."""
        run = self.launch.run
        groups = {**self.groups, **{name: self.groups[group] for name, group in sources.items()}}
        rows = {name: {"rows": 0 if group == HELDOUT else run.data.prompts_per_step} for name, group in sources.items()}
        default = {
            name: {"rows": self.launch.source_rows(name), "shift": self.shifts.get(name, 0)}
            for name in self.launch.recipe.sources
        }
        default[HELDOUT] = {"rows": 0}  # all of them
        return RayRunner(
            dataflow,
            groups,
            self.cluster.pools[HOST_POOL],
            seed=run.seed,
            call_timeout_s=run.ray.call_timeout_s if limit_s is None else limit_s,
            shortened=limit_s is not None,
            states=self.states,
            numbers=numbers,
            source_kwargs={**default, **rows},
            interrupts=run.placement.interrupt,
            beside=beside,
            replies=self.cluster.replies,
            watch=self.cluster.watch,
            check=check,
            replicas=replicas,
            looking=looking,
            pieces=run.placement.pieces,
        )

    def call_role(
        self, role: str, op: str, step: int, *, beside: bool = False, limit_s: float | None = None, **kwargs: Any
    ) -> dict[str, float]:
        """Run `op` on every rank of a role, without rows; returns its metrics. beside, limit_s: see `runner`."""
        node = Node(
            name=f"{role}.{op}",
            role=role,
            op=op,
            kind="op",
            kwargs=kwargs,
            spec=OpSpec(name=op, reads=(), dispatch=ONE_TO_ALL),
        )
        return self.runner(None, {}, beside=beside, limit_s=limit_s).run_node(node, step).metrics

    def sync(self, steps_done: int, only: Collection[str] | None = None) -> list[Finished]:
        """Give every role that generates, and has a training engine, the weights it has after `steps_done` steps. only:
        those; None: all."""
        runner = self.runner(None, {})
        generating = [role for role in self.launch.dataflow.generating if only is None or role in only]
        synced = [role for role in generating if role in self.groups and has_training_engine(self.launch, role)]
        return [runner.run_node(reshard_node(role), steps_done - 1) for role in synced]

    def save_state(self, held: HeldState, folder: Path) -> None:
        """Write a state's values, where there are others than numbers."""
        if held.ref is not None or held.first:
            self._on_host("save_state", held, str(folder.resolve()))

    def load_state(self, folder: Path) -> HeldState:
        """Read what `save_state` wrote."""
        return cast(HeldState, self._on_host("load_state", str(folder.resolve())))

    def _on_host(self, method: str, *arguments: Any) -> Any:
        """Raises ClusterError where the host process cannot do it."""
        process, timeout_s = self.cluster.pools[HOST_POOL].processes[0], self.launch.run.ray.call_timeout_s
        (answer,) = self.cluster.replies.get([getattr(process, method).remote(*arguments)], timeout_s)
        failure = failure_of_call(answer) if isinstance(answer, Exception) else answer
        if isinstance(failure, Failure):
            text = f"{method.replace('_', ' ')} {arguments[-1]}: {explained(failure, None)}"
            raise ClusterError(text).of(failure.kind)
        return answer

    # --- pools -------------------------------------------------------------------------------------------
    @property
    def pools(self) -> tuple[str, ...]:
        """Names of all pools that the launch uses, the host pool first."""
        placed = pools_of_roles(self.launch).values()
        return (HOST_POOL, *(name for name in self.launch.run.placement.pools if name in placed))

    def start(self, names: Collection[str], phase: Callable[[str], None]) -> None:
        """Start the processes of these pools and the workers they host, and connect them to each other and to the
        pools that are there. Raises ClusterError when something does not come up."""
        launch, run = self.launch, self.launch.run
        pools = self._start_processes([name for name in self.pools if name in names], phase)
        self._check_files(pools)
        starting: list[_Starting] = []
        if HOST_POOL in pools:
            starting += _host_sources(launch, pools[HOST_POOL].first, self.only)
        starting += _host_roles(launch, pools, self.only)
        self.groups |= {group.role: group for group, _ in starting}
        _await_roles(starting, self.cluster, run.ray.ready_timeout_s + run.ray.call_timeout_s, phase)
        self._connect(names, phase)

    def _start_processes(self, names: Sequence[str], phase: Callable[[str], None]) -> dict[str, Pool]:
        """All pools' processes start and import side by side; they join their groups a pool at a time."""
        layouts = {name: PoolConfig() if name == HOST_POOL else self._layout(name) for name in names}
        teams = {name: 0 if name == HOST_POOL else team_of(self.launch, name) for name in names}
        for name in names:
            self.cluster.begin_pool(name, layouts[name], teams[name], modules_of_pool(self.launch, name))
        self.cluster.await_processes()
        phase("imports: torch and engines")
        return {
            name: self.cluster.add_host_pool()
            if name == HOST_POOL
            else self.cluster.add_pool(name, layouts[name], teams[name])
            for name in names
        }

    def _layout(self, name: str) -> PoolConfig:
        return resolved(self.launch.run.placement, name)

    def change_pool(self, name: str, slots: int, dead: Collection[int], phase: Callable[[str], None]) -> None:
        """Give a pool of teams, which is at nothing, `slots` slots (on each of its nodes), and new processes instead of
        `dead` ranks. The others keep theirs and what they hold; a sync must follow. Raises NoRoom before anything has
        changed, or ClusterError."""
        launch, before = with_slots(self.launch, name, slots), self.cluster.pools[name]
        pool = self.cluster.change_pool(name, resolved(launch.run.placement, name), dead)
        self.launch = launch
        self._check_files({name: pool})
        new = [rank for rank in range(pool.size) if rank in dead or rank >= before.size]
        starting = _host_roles(launch, {name: pool}, self.only, new)
        self.groups |= {group.role: group for group, _ in starting}
        _await_roles(starting, self.cluster, launch.run.ray.ready_timeout_s + launch.run.ray.call_timeout_s, phase)
        self._connect((name,), phase)

    def _check_files(self, pools: Mapping[str, Pool]) -> None:
        """Raises ClusterError where a node lacks files; in a local run there is no other."""
        launch, wait_s = self.launch, self.launch.run.ray.ready_timeout_s
        if placed := {name: pool for name, pool in pools.items() if pool.node_ids}:
            folder, roles = _folder(launch), pools_of_roles(launch)
            check_files_are_shared(launch, folder, roles, placed, self.cluster.replies, wait_s)

    def _connect(self, names: Collection[str], phase: Callable[[str], None]) -> None:
        """Have roles that give each other weights meet, where a process of `names` is one of them."""
        groups, cluster, timeout_s = self.groups, self.cluster, self.launch.run.ray.call_timeout_s
        for role in self.launch.dataflow.generating:
            apart = groups.get(rollout_of(role))
            if apart is not None and {groups[role].pool.name, apart.pool.name} & set(names):
                phase(f"{role}: connecting {groups[role].pool.name} and {apart.pool.name}")
                _connect(groups[role], apart, cluster, timeout_s)
        ways = self.launch.dataflow.ways.items()
        for (source, target), staged in ((way, staged) for way, staged in ways if groups.keys() >= set(way)):
            if {groups[source].pool.name, groups[target].pool.name} & set(names):
                phase(f"{target}: planning how weights come from {source}")
                _connect_weights(groups[source], groups[target], staged, cluster, timeout_s)

    def rebuild(self, names: Collection[str], phase: Callable[[str], None]) -> None:
        """End these pools and start them anew, wherever there is room; the others keep their processes. Raises NoRoom,
        or ClusterError when something does not come up."""
        for name in names:
            self.cluster.end_pool(name)
        self.start(names, phase)

    @property
    def model_roles(self) -> list[str]:
        """Roles with weights of their own that learn: what is checkpointed and exported."""
        return self.launch.learning_roles


def start_session(launch: Launch, cluster: Processes, phase: Callable[[str], None]) -> Session:
    """Start pools and role workers; `phase` hears what begins. Where a process dies, all are started once more.
    Raises ClusterError when something does not come up."""
    session = Session(launch, cluster, {}, {name: kind() for name, kind in launch.recipe.states.items()})
    try:
        session.start(session.pools, phase)
    except LostInStart as error:
        if not launch.run.recovery.retries:
            raise
        phase(f"recovery: starting all processes again, once, after: {error}")
        for name in session.pools:
            cluster.end_pool(name)
        session.groups.clear()
        session.start(session.pools, phase)
    return session


def _host_sources(launch: Launch, first_host: Pool, only: Collection[str] | None) -> list[_Starting]:
    run, tokenizer = launch.run, tokenizer_of(launch)
    if tokenizer is None:
        raise ClusterError("no role has a model, so there is no tokenizer for the source")
    starting: list[_Starting] = []
    for k, name in enumerate(launch.recipe.sources):
        if only is not None and name not in only:
            continue
        group = WorkerGroup(name, first_host)
        own = {"heldout": run.data.heldout, "fields": launch.recipe.source_fields(name), "first_group": k << GROUP_BITS}
        starting.append((group, _host_source(launch, group, launch.source(name), tokenizer, **own)))
    if run.data.heldout is not None and only is None:
        group = WorkerGroup(HELDOUT, first_host)
        fields = held_out_fields(launch.recipe, launch.dataflow)
        starting.append((group, _host_source(launch, group, run.data.heldout, tokenizer, fields=fields)))
    return starting


def _host_roles(
    launch: Launch, pools: Mapping[str, Pool], only: Collection[str] | None, ranks: Collection[int] | None = None
) -> list[_Starting]:
    """Have the processes of these pools build the workers of the roles placed there. only: see `Session`. ranks: those
    only."""
    starting: list[_Starting] = []
    placed = pools_of_roles(launch)
    # What learns first: a frozen role may share the base of one with adapters.
    for name in sorted(placed, key=lambda name: not launch.dataflow.facts[name.split(".")[0]].trained):
        if placed[name] in pools and (only is None or name in only):
            pool = pools[placed[name]]
            group = WorkerGroup(name, pool, meshes_of(launch, name, pool.nodes))
            worker, settings = worker_of(launch, name)
            starting.append((group, _host_role(launch, group, worker, settings, ranks, here=only is not None)))
    return starting


def pools_of_roles(launch: Launch) -> dict[str, str]:
    """Role -> pool, for the roles the graph uses; `ROLE.rollout` too where generation has a pool of its own."""
    return {name: pool for name, pool in launch.placed.items() if name.split(".")[0] in launch.used_roles}


def team_of(launch: Launch, pool: str) -> int:
    """Ranks of a pool that hold one copy of a model together, and share a process group for that alone: the pool does
    nothing but generate. 0 where it does more, or its roles differ."""
    sizes = set()
    for name in (name for name, placed in pools_of_roles(launch).items() if placed == pool):
        role = name.split(".")[0]
        config = launch.roles[role]
        generates = name != role or only_generates(launch.recipe.roles[role], launch.dataflow.facts[role])
        sizes.add(config.rollout.tensor_parallel if generates and isinstance(config, LanguageModelConfig) else 0)
    return sizes.pop() if len(sizes) == 1 else 0


def modules_of_pool(launch: Launch, pool: str) -> list[str]:
    """What its processes import ahead; those of the host pool start within a second as it is."""
    names = [name for name, placed in pools_of_roles(launch).items() if placed == pool != HOST_POOL]
    return list(dict.fromkeys(module for name in names for module in modules_of(launch, name)))


def with_slots(launch: Launch, pool: str, slots: int) -> Launch:
    """The launch with another number of slots of a pool (on each of its nodes)."""
    placement = launch.run.placement
    changed = replace(resolved(placement, pool), slots=slots)
    placement = replace(placement, pools={**placement.pools, pool: changed})
    return replace(launch, run=replace(launch.run, placement=placement))


def slots_needed(launch: Launch) -> int:
    """Slots of all pools that some role is placed in."""
    return sum(pool_size(launch.run.placement, name) for name in set(pools_of_roles(launch).values()) - {HOST_POOL})


def _connect(sending: WorkerGroup, receiving: WorkerGroup, cluster: Processes, timeout_s: float) -> None:
    """Have all ranks of both pools meet, for the weights that go from one to the other."""
    bridge = _bridge(sending, receiving, cluster.replies, timeout_s)
    joining = [
        (group, {rank: process.connect.remote(group.role, bridge) for rank, process in _ranked(group)})
        for group in (sending, receiving)
    ]
    _await_roles(joining, cluster, timeout_s)


def _connect_weights(
    source: WorkerGroup, target: WorkerGroup, staged: int, cluster: Processes, timeout_s: float
) -> None:
    """Have all ranks of two roles plan how weights go from one to the other; staged: see `Dataflow.ways`."""
    apart = source.pool.name != target.pool.name
    bridge = _bridge(source, target, cluster.replies, timeout_s) if apart else None
    way = (source.role, target.role, bridge, staged)
    joining = [
        (group, {rank: process.connect_weights.remote(group.role, *way) for rank, process in _ranked(group)})
        for group in ((source, target) if apart else (target,))
    ]
    _await_roles(joining, cluster, timeout_s)


def _bridge(sending: WorkerGroup, receiving: WorkerGroup, replies: Replies, timeout_s: float) -> Bridge:
    (opened,) = replies.get([sending.pool.processes[0].open_port.remote()], timeout_s)
    if isinstance(opened, Exception):
        raise opened
    if isinstance(opened, Failure):
        raise ClusterError(f"{sending.role}, rank 0, could not listen for weight syncs: {opened.text}")
    address, port, secret = cast(tuple[str, int, str], opened)
    return Bridge(
        address=address,
        port=port,
        secret=secret,
        senders=sending.pool.size,
        receivers=receiving.pool.size,
        nodes=machines((*sending.pool.node_ids, *receiving.pool.node_ids)),
        timeout_s=SYNC_SHARE * timeout_s,
    )


def _host_source(
    launch: Launch, group: WorkerGroup, config: SourceConfig, tokenizer: str, **own: Any
) -> dict[int, Any]:
    settings = {"config": config, "data": launch.run.data, "tokenizer": tokenizer, **own}
    return _host_role(launch, group, SOURCE_WORKER, settings)


def _folder(launch: Launch) -> Path:
    """Of the run; every process names it alike."""
    return (Path(launch.run.output.root) / launch.run.name).resolve()


def phases_of_pool(launch: Launch, pool: str) -> tuple[str, ...]:
    """What a step asks of the devices of `pool`, in order."""
    bases = {name: base for name in launch.used_roles if (base := role_with_base(launch, name)) is not None}
    return phases_of(launch.dataflow, pools_of_roles(launch), pool, bases)


def _host_role(
    launch: Launch,
    group: WorkerGroup,
    worker: str | type,
    settings: Mapping[str, Any],
    ranks: Collection[int] | None = None,
    *,
    here: bool = False,
) -> dict[int, Any]:
    """ranks: those only. here: see `WorkerContext`."""
    context = {
        "seed": launch.run.seed,
        "frozen_folders": frozen_folders(launch),
        "tokenizers": tokenizers(launch),
        "heads": getattr(launch.recipe.roles.get(group.role), "heads", ()),
        "sums_weights": group.role in {node.role for node in launch.dataflow if node.op in ("mix_from", "merge_from")},
        "total_steps": launch.run.steps,
        "nodes": group.pool.nodes,
        "sync_timeout_s": SYNC_SHARE * launch.run.ray.call_timeout_s,
        "folder": str(_folder(launch)),
        "here": here,
    }
    memory: dict[str, Any] = {}
    if group.pool.name != HOST_POOL:
        device_bytes = launch.run.placement.pools[group.pool.name].device_bytes
        memory = {"device_bytes": device_bytes, "phases": phases_of_pool(launch, group.pool.name)}
    return {
        rank: process.host_role.remote(group.role, worker, settings, context, **memory)
        for rank, process in _ranked(group)
        if ranks is None or rank in ranks
    }


def _ranked(group: WorkerGroup) -> Iterable[tuple[int, Any]]:
    return enumerate(group.pool.processes)


def _await_roles(
    starting: list[_Starting],
    cluster: Processes,
    timeout_s: float,
    phase: Callable[[str], None] = lambda text: None,
) -> None:
    """Wait until every rank of every group has answered, `timeout_s` at most for the next; `phase` hears what the
    first rank of each pool is at. Raises ClusterError for the first that failed, or is lost."""
    replies, watch, began = cluster.replies, cluster.watch, time.perf_counter()
    rank_of = {ref: (group, rank) for group, refs in starting for rank, ref in refs.items()}
    left, answered_s = list(rank_of), time.monotonic()
    phases = _Phases(phase, replies)
    while left:
        ready = replies.ready(left, 1.0)
        left = [ref for ref in left if ref not in ready]
        phases.ask({rank_of[ref][0].pool.name: rank_of[ref][0].pool for ref in left})
        for ref in ready:
            answered_s = time.monotonic()
            group, rank = rank_of[ref]
            answer: Any = replies.get([ref], 60.0)[0]
            failure = failure_of_call(answer) if isinstance(answer, Exception) else answer
            if isinstance(failure, Failure) and failure.secondary and watch is not None:
                _check_lost(watch.first_cause(_waited(rank_of.values(), began), died=failure.lost), rank_of.values())
            remarks = _check_started(failure, group, rank)
            for remark in remarks if rank == 0 else ():
                phase(f"{group.role}: {remark}")
        if watch is not None:
            _check_lost(watch.look(_waited((rank_of[ref] for ref in left), began)), rank_of.values())
        if left and time.monotonic() - answered_s > timeout_s:
            missing = sorted({rank_of[ref][0].role for ref in left})
            logs = [log for ref in left if (log := rank_of[ref][0].pool.log(rank_of[ref][1]))]
            raise ClusterError(
                f"the workers of {', '.join(missing)} did not start within {timeout_s:g} s{logs_of(logs)}"
            )


def _waited(ranks: Iterable[tuple[WorkerGroup, int]], since_s: float) -> list[Waited]:
    """The processes, each once: several roles may start in one."""
    return list({(group.pool.name, rank): Waited(group.pool, rank, since_s) for group, rank in ranks}.values())


def _check_lost(cause: FirstCause | None, starting: Collection[tuple[WorkerGroup, int]]) -> None:
    """Raises ClusterError for a process that was lost while it started."""
    if cause is None:
        return
    at = next((one for one in starting if (one[0].pool.name, one[1]) == (cause.pool, cause.rank)), None)
    who = "a worker" if at is None else f"{at[0].role}, rank {cause.rank},"
    log = at[0].pool.log(cause.rank) if at is not None else None
    text = f"{who} could not start: {cause.text}{logs_of([log]) if log else ''}"
    if cause.fatal:  # Nothing is rebuilt without Ray's head: the run ends.
        raise ClusterError(text).of(FailureKind.CODE)
    raise LostInStart(text)


def _check_started(answer: Any, group: WorkerGroup, rank: int) -> tuple[str, ...]:
    """What the worker has to say. Raises ClusterError if it did not start."""
    if isinstance(answer, Failure):
        text = f"{group.role}, rank {rank}, could not start: {explained(answer, group.pool.log(rank))}"
        raise ClusterError(text).of(answer.kind)
    return tuple(answer or ())


class _Phases:
    """What pools are starting, asked beside the start itself and never waited for."""

    def __init__(self, tell: Callable[[str], None], replies: Replies) -> None:
        self._tell, self._replies = tell, replies
        self._asked: dict[str, Any] = {}
        self._told: set[str] = set()

    def ask(self, pools: Mapping[str, Pool]) -> None:
        for name, pool in pools.items():
            if name not in self._asked:
                self._asked[name] = pool.processes[0].phase.options(concurrency_group=SIGNALS).remote()
        answered = self._replies.ready(list(self._asked.values()), 0.0) if self._asked else []
        for name in [name for name, ref in self._asked.items() if ref in answered]:
            (text,) = self._replies.get([self._asked.pop(name)], 60.0)
            # An exception is a process that died, which is found where it is waited for.
            if isinstance(text, str) and text and text not in self._told:
                self._told.add(text)
                self._tell(text)
