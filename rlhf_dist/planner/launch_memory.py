"""Bytes a rank of a launch, by phase, on its device and in host memory: what `check` prints, and refuses.

    rest       what lies there while no role of the pool runs
    load       a role's own shard, and the largest tensor of its files on the way; the whole model for a moment where it
               starts at random or has adapters
    generate   the generation engine's copy of the weights and its KV cache
    forward    activations of one layer, logits of one chunk, gathered parameters
    update     gradients, activations for the backward pass, logits of one chunk, gathered parameters
    sync       the generation engine's copy, and buckets on their way (two rounds)

On a GPU the roles of a pool take turns (`device_ledger.py`): the largest phase must fit, and what is not at work waits
in host memory; where everything fits at one time nothing moves. On a CPU there is one memory, which all ranks of the
machine share. Formulas of activations, logits and keys and values are those of the planner (`memory.py`); states are
what the engines hold: float32 master weights, two moments and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rlhf_dist.checks import max_row_tokens, rows_of_nodes
from rlhf_dist.config import EngineConfig, RolloutConfig
from rlhf_dist.hardware import GIB, Cluster, parse_cluster
from rlhf_dist.model_specs import ModelSpec, model_spec
from rlhf_dist.placement.roles import HOST_POOL, pool_size, rollout_of
from rlhf_dist.planner.machine import this_machine, usual_efficiency
from rlhf_dist.planner.memory import activation_bytes_per_token, kv_bytes_per_token, logit_bytes, usable_bytes
from rlhf_dist.planner.strategy import Generation, Strategy
from rlhf_dist.reshard.rounds import default_bucket_bytes
from rlhf_dist.role_kinds import generation_of, has_training_engine
from rlhf_dist.typed import ConfigError

if TYPE_CHECKING:
    from rlhf_dist.compose import Launch
    from rlhf_dist.role_kinds import RoleConfig

WIDTH = {"float32": 4.0, "bfloat16": 2.0}
MASTER, MOMENTS, GRADIENT = 4.0, 8.0, 4.0
"""Bytes of a parameter: float32 master weight, Adam's two moments, float32 gradient."""
PHASES = ("load", "rest", "generate", "forward", "update", "sync")


@dataclass(frozen=True, kw_only=True)
class PhaseBytes:
    """What one rank of a pool has in one phase."""

    pool: str
    phase: str
    device: Mapping[str, float]
    """What it is (`actor gradients`) -> bytes."""
    host: Mapping[str, float]


@dataclass(frozen=True)
class _Role:
    name: str
    config: RoleConfig
    model: ModelSpec
    slots: int
    trained: bool

    @property
    def engine(self) -> EngineConfig:
        return self.config.engine

    @property
    def width(self) -> float:
        return WIDTH[self.engine.dtype]

    @property
    def strategy(self) -> Strategy:
        engine = self.engine
        return Strategy(
            gpus=self.slots // engine.replicas,
            tp=engine.tensor_parallel,
            sp=engine.sequence_parallel,
            zero=3 if engine.name == "fsdp" else engine.zero_stage,
        )

    @property
    def whole(self) -> float:
        """Parameters that a rank computes with at stages that do not shard them."""
        return self.model.parameters / self.engine.tensor_parallel

    @property
    def shard(self) -> float:
        """Parameters of a rank where they are sharded over all ranks of a replica."""
        return self.model.parameters / self.strategy.gpus

    def states(self) -> dict[str, float]:
        """At rest: weights and optimizer states. DeepSpeed keeps weights in the engine's dtype beside the master."""
        kept = self.shard if self.strategy.zero == 3 else self.whole
        apart = self.engine.name == "deepspeed" and self.width != MASTER
        if not self.trained:
            return {f"{self.name} weights": self.width * kept}
        if self.engine.lora is not None:
            return {f"{self.name} weights": MASTER * self.shard}  # adapters and their states are a few per cent
        weights = (self.width if apart else MASTER) * kept
        return {
            f"{self.name} weights": weights,
            f"{self.name} optimizer": (MOMENTS + (MASTER if apart else 0.0)) * self.shard,
        }

    def pass_tokens(self, rows: int, longest: int) -> int:
        """Most tokens of one forward pass, where the role has `rows` rows a step and each may be the longest."""
        ranks = self.slots // (self.strategy.tp * self.strategy.sp)
        return max(longest, min(self.engine.micro_batch_tokens, -(-rows // ranks) * longest))

    def forward(self, tokens: int) -> dict[str, float]:
        """Beside the states, while it computes log-probs or values in passes of `tokens`."""
        scale = self.width / 2.0
        _, layer = activation_bytes_per_token(self.model, self.strategy, recompute=True)
        gathered = 0.0
        if self.strategy.zero == 3 and self.strategy.gpus > self.strategy.tp:
            gathered = self.width * (2 * self.model.layer + self.model.vocabulary * self.model.hidden)
        return {
            f"{self.name} activations": scale * layer * tokens,
            f"{self.name} logits": logit_bytes(self.model, self.strategy) * self.engine.logit_chunk_tokens / 1024,
            f"{self.name} gathered": gathered / self.strategy.tp,
        }

    def update(self, tokens: int) -> dict[str, float]:
        """Beside the states, while it trains in passes of `tokens`."""
        scale = self.width / 2.0
        recompute = self.engine.activation_checkpointing
        kept, _ = activation_bytes_per_token(self.model, self.strategy, recompute=recompute)
        held = self.shard if self.strategy.zero >= 2 else self.whole
        gradients = 0.0 if self.engine.lora is not None else GRADIENT * held
        found = self.forward(tokens)
        found[f"{self.name} activations"] += scale * kept * tokens
        return {**found, f"{self.name} gradients": gradients}


def memory_of(launch: Launch, cluster: Cluster) -> list[PhaseBytes]:
    """Pools and phases of a launch on `cluster`, in order. Raises ConfigError for a model whose shape is not said."""
    placed = launch.placed
    learning, cuda = set(launch.dataflow.trained), cluster.gpu.name != "CPU"
    longest = max_row_tokens(launch)[0]
    found: list[PhaseBytes] = []
    pools = {pool for name, pool in placed.items() if name.split(".")[0] in launch.used_roles} - {HOST_POOL}
    for pool in [name for name in launch.run.placement.pools if name in pools]:
        slots = pool_size(launch.run.placement, pool)
        roles = {
            name: _Role(name, config, model_spec(config.model.path, f"{name}.model.path"), slots, name in learning)
            for name, config in launch.used_roles.items()
            if config.model is not None and placed[name] == pool and has_training_engine(launch, name)
        }
        generators = {
            name: (rollout, model_spec(config.model.path, f"{name}.model.path"))
            for name, config in launch.used_roles.items()
            if config.model is not None
            and (rollout := generation_of(launch, name)) is not None
            and placed.get(rollout_of(name), placed[name]) == pool
        }
        room = _room(launch, pool, cluster)
        for phase, device, host in _phases(launch, roles, generators, slots, cluster, longest, cuda, room):
            found.append(PhaseBytes(pool=pool, phase=phase, device=device, host=host))
    return found


def _phases(
    launch: Launch,
    roles: Mapping[str, _Role],
    generators: Mapping[str, tuple[RolloutConfig, ModelSpec]],
    slots: int,
    cluster: Cluster,
    longest: int,
    cuda: bool,
    room: float,
) -> Iterator[tuple[str, dict[str, float], dict[str, float]]]:
    rows = rows_of_nodes(launch)
    states = {name: role.states() for name, role in roles.items()}
    copies, caches, buckets = dict[str, float](), dict[str, float](), dict[str, float]()
    for name, (rollout, model) in generators.items():
        tp = Generation(gpus=slots, tp=rollout.tensor_parallel)
        copies[f"{name} generation weights"] = WIDTH[rollout.dtype] * model.parameters / rollout.tensor_parallel
        if rollout.engine == "transformers":
            own = max(1, launch.run.data.prompts_per_step // max(1, tp.replicas))
            cache = own * longest * kv_bytes_per_token(model, tp) * WIDTH[rollout.dtype] / 2.0
        else:
            share = (rollout.gpu_memory_share or 0.0) * cluster.gpu.memory_bytes
            cache = float(rollout.kv_cache_bytes or 0) or max(0.0, share - sum(copies.values()))
        caches[f"{name} KV cache"] = cache
        buckets[f"{name} buckets"] = 2.0 * float(
            rollout.bucket_bytes or default_bucket_bytes("cuda" if cuda else "cpu")
        )
    for role in roles.values():
        drawn = role.config.model is not None and role.config.model.init == "random"
        # A folder is read a tensor at a time, a random start is drawn a layer at a time.
        part, size = ("largest part", role.model.layer) if drawn else ("largest tensor", 0)
        yield "load", role.states(), {f"{role.name} {part}": MASTER * max(size, _largest_tensor(role.model))}
    uses: list[tuple[str, dict[str, float], dict[str, float]]] = []
    """Phase, what must be there of what the roles hold, what it takes for a while."""
    if generators:
        uses.append(("generate", {**copies, **caches}, {}))
    ops = {node.name: node for node in launch.dataflow if node.role in {*roles, *generators}}
    for node in ops.values():
        if node.kind != "op" or node.role not in roles or node.rows == "expand" or not node.inputs:
            continue
        role, trains = roles[node.role], bool(node.weights_written)
        tokens = role.pass_tokens(rows[node.name][0], longest)
        needs = {what: size for what, size in states[role.name].items() if trains or what.endswith(" weights")}
        uses.append(("update", needs, role.update(tokens)) if trains else ("forward", needs, role.forward(tokens)))
    if any(node.kind == "reshard" for node in ops.values()):
        weights = {what: size for name in generators for what, size in states.get(name, {}).items()}
        weights = {what: size for what, size in weights.items() if what.endswith(" weights")}
        uses.append(("sync", {**weights, **copies}, buckets))
    held = {what: size for kept in states.values() for what, size in kept.items()}
    away = {what: size for what, size in held.items() if cuda and _offloaded(roles[what.split()[0]].engine, what)}
    fixed = {**copies, **caches} if not all(rollout.sleeps for rollout, _ in generators.values()) else {}
    most = max((sum(transient.values()) for _, _, transient in uses), default=0.0)
    everything = {**{what: size for what, size in held.items() if what not in away}, **copies, **caches}
    if cuda and sum(everything.values()) + most > room:
        # Host buffers stay once they are there. Generation weights come with the next sync, caches from nowhere.
        everything, away = fixed, held
    yield "rest", everything, away
    for phase, needs, transient in uses:
        yield phase, {**everything, **needs, **transient}, away


def _offloaded(engine: EngineConfig, what: str) -> bool:
    return engine.offload == "all" or engine.offload == what.split()[-1]


def _largest_tensor(model: ModelSpec) -> float:
    expert = model.expert / 3 if model.experts else 0.0
    return max(model.vocabulary * model.hidden, model.hidden * model.intermediate, expert * max(1, model.experts))


def memory_lines(launch: Launch, cluster: Cluster) -> list[str]:
    """A table for people. Raises ConfigError naming pool, phase and role for what cannot fit."""
    return _lines(launch, memory_of(launch, cluster), cluster)


def _lines(launch: Launch, found: list[PhaseBytes], cluster: Cluster) -> list[str]:
    check_memory(launch, found, cluster)
    room = usable_bytes(cluster, usual_efficiency(cluster))
    what = "rank" if cluster.gpu.name == "CPU" else f"{cluster.gpu.name}, {_gib(room)} usable"
    lines = [f"memory    GiB a rank on {cluster.text} ({what}): device + host"]
    for pool in dict.fromkeys(one.pool for one in found):
        worst = {
            phase: max((one for one in found if (one.pool, one.phase) == (pool, phase)), key=_device, default=None)
            for phase in PHASES
        }
        cells = [
            f"{phase} {_number(_device(one))}" + (f" + {_number(sum(one.host.values()))}" if one.host else "")
            for phase, one in worst.items()
            if one is not None
        ]
        lines.append(f"          {pool}: {', '.join(cells)}")
    return lines


def here_lines(launch: Launch) -> list[str]:
    """The table for where the launch will run; nothing where that is not known before the run.

    A model whose config.json has other names for its sizes is no reason to refuse it: it is said.
    """
    cluster = _here(launch)
    if cluster is None:
        return []
    try:
        found = memory_of(launch, cluster)
    except ConfigError as unknown:
        return [f"memory    not computed: {unknown}"]
    return _lines(launch, found, cluster)


def memory_report(launch: Launch, cluster: Cluster | None) -> dict[str, Any]:
    """For programs: `cluster`, and `memory` with pool, phase, and bytes a rank by what they are."""
    cluster = cluster or _here(launch)
    if cluster is None:
        return {"cluster": None, "memory": []}
    return {"cluster": cluster.text, "memory": [asdict(one) for one in memory_of(launch, cluster)]}


def _here(launch: Launch) -> Cluster | None:
    if launch.run.ray.address is not None:
        described = launch.run.placement.cluster
        return None if described is None else parse_cluster(described, key="placement.cluster")
    try:
        return this_machine()
    except ConfigError:
        return None  # A GPU of a kind whose memory nobody has told us.


def _room(launch: Launch, pool: str, cluster: Cluster) -> float:
    """Bytes for tensors on a device of `pool`."""
    usable = usable_bytes(cluster, usual_efficiency(cluster))
    limit = launch.run.placement.pools[pool].device_bytes
    return usable if limit is None else min(usable, float(limit))


def check_memory(launch: Launch, found: list[PhaseBytes], cluster: Cluster) -> None:
    """Raises ConfigError for the phase that needs most over what there is, with the role that holds most of it."""
    if cluster.gpu.name == "CPU":
        _check_cpu(launch, found, cluster)
        return
    for worst in sorted(found, key=_device, reverse=True):
        room = _room(launch, worst.pool, cluster)
        if _device(worst) > room:
            limited = launch.run.placement.pools[worst.pool].device_bytes is not None
            whose = f"placement.pools.{worst.pool}.device_bytes leaves" if limited else f"a {cluster.gpu.name} has"
            raise ConfigError(_refusal(worst, worst.device, room, f"{whose} {_gib(room)} for tensors"))
    host = 0.9 * cluster.gpu.host_memory_bytes
    for one in found:
        if sum(one.host.values()) > host:
            says = f"a node has {_gib(host)} of host memory for each of its GPUs"
            raise ConfigError(_refusal(one, one.host, host, says))


def _check_cpu(launch: Launch, found: list[PhaseBytes], cluster: Cluster) -> None:
    """Ranks of all pools share the machine's memory, and none gives anything back."""
    total = cluster.gpu.memory_bytes * cluster.gpus
    worst = {pool: max((o for o in found if o.pool == pool), key=_device) for pool in {one.pool for one in found}}
    needed = {pool: _device(one) * pool_size(launch.run.placement, pool) for pool, one in worst.items()}
    if sum(needed.values()) > total:
        pool = max(needed, key=lambda name: needed[name])
        ranks = pool_size(launch.run.placement, pool)
        says = f"{ranks} such ranks and the other pools share the machine's {_gib(total)}"
        raise ConfigError(_refusal(worst[pool], worst[pool].device, total, says))


def _refusal(one: PhaseBytes, parts: Mapping[str, float], room: float, says: str) -> str:
    most = sorted(parts.items(), key=lambda part: -part[1])
    role = most[0][0].split(" ")[0]
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in most[:4])
    return (
        f"pool {one.pool!r} does not fit: {one.phase} needs {_gib(sum(parts.values()))} a rank ({listed}), and {says}; "
        f"role {role!r} holds most: give the pool more slots, set {role}.engine.offload=all or "
        f"{role}.engine.activation_checkpointing=true, lower {role}.engine.micro_batch_tokens, or take a smaller model"
    )


def _device(one: PhaseBytes | None) -> float:
    return 0.0 if one is None else sum(one.device.values())


def _number(size: float) -> str:
    return f"{size / GIB:.3g}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
