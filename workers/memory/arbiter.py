"""The one arbiter of a process's device: every role's engines register here, and using one is its turn.

    engine to build  make_room()  all others leave
    engine built     add_...      what it holds, and what each use of it needs, is entered in the ledger
    engine used      turn(phase)  others leave until it fits, then it comes         (device_ledger.py says who)

Sizes are the largest of all ranks of the pool; calls come in one order on all of them; so they decide alike. Without a
limit (a CPU, unless `placement.pools.X.device_bytes` makes it act like a device) nothing moves at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from rlhf_dist.device_ledger import Ledger, Moves, Part, Phase, leaves_at
from rlhf_dist.metrics import Largest, Mean, Metrics
from rlhf_dist.placement.phases import generation_phase
from rlhf_dist.wire import WorkerContext
from workers.engines.generation.interface import GenerationEngine
from workers.engines.training.interface import TrainingEngine, Use
from workers.memory.meter import Meter
from workers.memory.tenants import GenerationTenant, Tenant, TrainingTenant

SPARE = 1.5
"""What a phase was seen to take beside what it holds counts this many times: the next batch may be longer."""


@dataclass
class _Turn:
    """What one turn moved."""

    copied: int = 0
    seconds: float = 0.0
    used: int = 0


@dataclass
class Arbiter:
    """Of one process. All ranks of its pool make the same calls."""

    device: torch.device
    limit: int | None = None
    """Bytes that the engines may have on the device; None: as many as it has."""
    order: Sequence[str] = ()
    """Phases of this pool in the order in which a step runs them."""
    setting: str = "placement.pools.POOL.device_bytes"
    phase: str | None = None
    """Whose turn it is."""
    _tenants: dict[str, Tenant] = field(default_factory=dict)
    _there: set[Part] = field(default_factory=set)
    _dropped: set[Part] = field(default_factory=set)
    _working: dict[str, int] = field(default_factory=dict)
    _turns: dict[str, _Turn] = field(default_factory=dict)
    _at: int = -1
    _used: int = 0
    """Bytes on the device since something last moved."""

    def __post_init__(self) -> None:
        self._meter = Meter(self.device)
        budget = self._meter.capacity() if self.limit is None else self.limit
        self.ledger = Ledger(budget, tuple(self.order), self.setting)

    @property
    def limited(self) -> bool:
        """Whether anything ever moves."""
        return self.ledger.budget is not None

    # --- what there is ---------------------------------------------------------------------------------
    def add_training(self, role: str, engine: TrainingEngine, *, trained: bool) -> None:
        """Enter a training engine, whose every use is a turn from now on. Collective; raises DeviceTooSmall."""
        if not self.limited:
            return
        parts = engine.device_parts()
        self._add(role, TrainingTenant({str(kind): part for kind, part in parts.items()}))
        phases = [Phase(name=f"{role}.forward", needs=frozenset({(role, "parameters")}))]
        states = frozenset((role, kind) for kind in ("parameters", "optimizer") if kind in parts)
        phases.append(Phase(name=f"{role}.write", needs=states, writes=states))
        if trained:
            everything = frozenset((role, kind) for kind in parts)
            written = frozenset({(role, "parameters"), (role, "optimizer")})
            gradients = self._largest([engine.gradient_bytes])[0]
            phases.append(
                Phase(name=f"{role}.update", needs=everything, writes=written, transient={"gradients": gradients})
            )
        self._enter(*phases)
        engine.before_use = self._before_use(role)

    def add_generation(self, name: str, engine: GenerationEngine, *, sleeps: bool) -> None:
        """Enter a generation engine that has been traced. name: `ROLE.rollout`. Collective; raises DeviceTooSmall."""
        if not self.limited:
            return
        self._add(name, GenerationTenant(engine, sleeps=sleeps))
        needs = frozenset({(name, "weights"), (name, "cache")}) & self.ledger.sizes.keys()
        self._enter(Phase(name=generating(name), needs=needs))

    def add_sync(self, name: str, needs: Mapping[str, str], *, overwrites: bool, buckets: int) -> None:
        """Enter a weight sync. needs: tenant -> kind. overwrites: every weight is written. buckets: bytes on their way.
        Collective; raises DeviceTooSmall."""
        if not self.limited:
            return
        parts = frozenset(needs.items()) & self.ledger.sizes.keys()
        weights = frozenset(part for part in parts if part[1] == "weights")
        self._enter(
            Phase(
                name=name,
                needs=parts,
                writes=weights,
                overwrites=weights if overwrites else frozenset(),
                transient={"buckets": self._largest([buckets])[0]},
            )
        )

    def add_together(self, name: str, *lenders: str) -> str:
        """Enter the phase in which `name` generates beside `lenders`, all `ROLE.rollout`: from a mixture of their
        logits, or in episodes in which they speak; its name. Raises DeviceTooSmall."""
        phase = generating(name, *lenders)
        if self.limited and phase not in self.ledger.phases:
            needs = [self.ledger.phases[generating(one)].needs for one in (name, *lenders)]
            self._enter(Phase(name=phase, needs=frozenset().union(*needs)))
        return phase

    # --- turns -----------------------------------------------------------------------------------------
    def make_room(self) -> None:
        """Before another engine is built: everything leaves, since nobody knows yet what that needs."""
        if self.limited:
            self._move(Moves(dict.fromkeys(sorted(self._there, key=leaves_at), True), ()), _Turn())
            self.phase = None

    def turn(self, phase: str) -> None:
        """Bring the device into a phase; nothing where it is in it already."""
        if not self.limited or phase == self.phase:
            return
        self._remember_working()
        self._at = self.ledger.position(self._at, phase)
        known = self._working.get(phase, 0 if self.device.type == "cpu" else None)
        moves, turn = self.ledger.moves(self._there, phase, self._at, known), self._turns.setdefault(phase, _Turn())
        self._move(moves, turn)
        one = self.ledger.phases[phase]
        for tenant, kind in one.writes:
            self._tenants[tenant].written(kind)
        self._dropped -= one.overwrites
        turn.used = max(turn.used, self._used)
        self.phase = phase
        self._meter.begin()

    def _move(self, moves: Moves, turn: _Turn) -> None:
        if not moves.leave and not moves.come:
            return
        started = time.perf_counter()
        for (tenant, kind), keep in moves.leave.items():
            turn.copied += self._tenants[tenant].leave(kind, keep)
            self._there.remove((tenant, kind))
            if not keep:
                self._dropped.add((tenant, kind))
        self._meter.settle()
        for tenant, kind in moves.come:
            turn.copied += self._tenants[tenant].come(kind)
            self._there.add((tenant, kind))
        self._used = self._meter.used(self.held_bytes())
        turn.seconds += time.perf_counter() - started

    def has_dropped(self, tenant: str, kind: str) -> bool:
        """Whether the contents are gone, since a sync was to come first."""
        return (tenant, kind) in self._dropped

    def held_bytes(self) -> int:
        """Bytes of all that is registered and on the device, as the storages say."""
        return sum(sum(tenant.held().values()) for tenant in self._tenants.values())

    def report(self) -> Metrics:
        """What the turns since the last report moved, by use: bytes on the device, predicted, moved, and a second."""
        turns, self._turns = self._turns, {}
        metrics: Metrics = {}
        for phase, turn in turns.items():
            use = phase.rpartition(".")[2]
            metrics[f"device_bytes_{use}"] = Largest(float(turn.used))
            metrics[f"predicted_bytes_{use}"] = Largest(float(self.ledger.predicted_bytes(phase)))
            metrics[f"moved_bytes_{use}"] = Mean(float(turn.copied), 1)
            if turn.copied:
                metrics[f"moved_bytes_per_s_{use}"] = Mean(float(turn.copied), turn.seconds)
        return metrics

    # --- within ----------------------------------------------------------------------------------------
    def _add(self, name: str, tenant: Tenant) -> None:
        self._tenants[name] = tenant
        held = tenant.held()
        sizes = [held[kind] for kind in tenant.kinds]
        # What no tenant can give back is fixed: contexts, communicators and fragments too, where the driver counts.
        known = sum(self.ledger.fixed.values()) + sum(self.ledger.sizes[part] for part in self._there)
        self._used = self._meter.used(self.held_bytes())
        *sizes, stays = self._largest([*sizes, max(0, self._used - known - sum(sizes))])
        self.ledger.add(name, dict(zip(tenant.kinds, sizes, strict=True)), {"what cannot leave": stays})
        self._there |= {(name, kind) for kind in tenant.kinds}

    def _enter(self, *phases: Phase) -> None:
        self.ledger.phases |= {phase.name: phase for phase in phases}
        self.ledger.check()

    def _before_use(self, role: str) -> Callable[[Use], None]:
        return lambda use: self.turn(f"{role}.{use}")

    def _remember_working(self) -> None:
        """What the phase that ends took for a while, on the rank where that was most."""
        if self.phase is not None and self.device.type != "cpu":
            seen = self._largest([int(SPARE * self._meter.working())])[0]
            self._working[self.phase] = max(seen, self._working.get(self.phase, 0))

    def _largest(self, sizes: list[int]) -> list[int]:
        """The largest of all ranks' numbers, one by one. Collective."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return sizes
        most = torch.tensor(sizes, dtype=torch.int64, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return [int(size) for size in most.tolist()]


def new_arbiter(device: str, device_bytes: int | None, phases: Sequence[str], pool: str) -> Arbiter:
    """The arbiter of a process of `pool`."""
    return Arbiter(torch.device(device), device_bytes, phases, f"placement.pools.{pool}.device_bytes")


def generating(*rollouts: str) -> str:
    """The phase in which `ROLE.rollout` generates, `ROLE.generate`; `A+B.generate` where A does beside B."""
    return generation_phase(rollout.removesuffix(".rollout") for rollout in rollouts)


def arbiter_of(context: WorkerContext) -> Arbiter:
    """The process's arbiter; one that limits nothing where a worker stands alone."""
    return context.memory if context.memory is not None else Arbiter(torch.device("cpu"))
