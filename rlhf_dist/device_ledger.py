"""What the engines of one process hold on their device, and what leaves it when one of them is used. No torch.

tenant   what one engine holds, by kind                actor: parameters, optimizer      actor.rollout: weights, cache
phase    one use: what must be there for it            actor.update: both, and gradients for a while
                                                       actor.sync: actor's parameters, actor.rollout's weights, buckets

    turn(phase)    others leave until it fits, those first that are needed again last; then what it needs comes

What fits may stay, so nothing moves where everything fits. Sizes are the largest of a pool's ranks, and every decision
is a function of sizes, phases and their order: all ranks decide alike, without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

Part = tuple[str, str]
"""(tenant, kind): what moves as one."""
LEAVE_FIRST = ("buckets", "gradients", "optimizer", "cache", "parameters", "weights")
"""Of parts that are needed again at the same time: a cache goes with its weights, and before them."""


class DeviceTooSmall(RuntimeError):
    """A phase that does not fit on the device, even if everything else has left it."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One use of an engine."""

    name: str
    """`ROLE.USE`, e.g. `actor.update`."""
    needs: frozenset[Part]
    """What must be on the device."""
    writes: frozenset[Part] = frozenset()
    """What it changes: a copy in host memory is out of date afterwards."""
    overwrites: frozenset[Part] = frozenset()
    """What it writes whole before anything reads it: what that held before need not be kept."""
    transient: Mapping[str, int] = field(default_factory=dict)
    """What it takes for a while, e.g. `gradients` -> bytes."""

    @property
    def role(self) -> str:
        """Whose use it is."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Moves:
    """Into a phase: everything in `leave` first, then everything in `come`."""

    leave: Mapping[Part, bool]
    """Part -> whether its contents are kept in host memory."""
    come: tuple[Part, ...]


@dataclass
class Ledger:
    """Sizes and phases of the tenants of one process."""

    budget: int | None
    """Bytes of the device; None: any number."""
    order: tuple[str, ...] = ()
    """Phases in the order in which a step runs them, step after step."""
    setting: str = "placement.pools.POOL.device_bytes"
    """What sets the budget."""
    sizes: dict[Part, int] = field(default_factory=dict)
    """What moves -> bytes."""
    fixed: dict[Part, int] = field(default_factory=dict)
    """What never leaves -> bytes."""
    phases: dict[str, Phase] = field(default_factory=dict)

    def add(self, tenant: str, movable: Mapping[str, int], fixed: Mapping[str, int]) -> None:
        """Enter a tenant: kind -> bytes of what moves, and of what cannot."""
        self.sizes |= {(tenant, kind): size for kind, size in movable.items()}
        self.fixed |= {(tenant, kind): size for kind, size in fixed.items()}

    def predicted_bytes(self, phase: str, working: int = 0) -> int:
        """Least bytes on the device in a phase. working: what it was seen to take for a while; counts if it is more
        than the phase says."""
        one = self.phases[phase]
        transient = max(sum(one.transient.values()), working)
        return sum(self.fixed.values()) + sum(self.sizes.get(part, 0) for part in one.needs) + transient

    def check(self) -> None:
        """Raise DeviceTooSmall for the phase that needs most, where that does not fit."""
        if self.budget is None or not self.phases:
            return
        worst = max(self.phases.values(), key=lambda phase: self.predicted_bytes(phase.name))
        needed = self.predicted_bytes(worst.name)
        if needed > self.budget:
            parts = {part: self.sizes.get(part, 0) for part in sorted(worst.needs)} | self.fixed
            listed = [f"{tenant} {kind} {size}" for (tenant, kind), size in parts.items() if size]
            listed += [f"{what} {size}" for what, size in worst.transient.items() if size]
            raise DeviceTooSmall(
                f"phase {worst.name} of role {worst.role!r} needs {needed} bytes on every rank's device "
                f"({', '.join(listed)}), and {self.setting} is {self.budget}: raise it, give the pool more slots, or "
                f"take a smaller model for {worst.role!r}"
            )

    def position(self, after: int, phase: str) -> int:
        """Where in `order` a step is that was at `after` and now runs `phase`; `after` for one that no step runs."""
        places = [(after + k) % len(self.order) for k in range(1, len(self.order) + 1)] if self.order else []
        return next((place for place in places if self.order[place] == phase), after)

    def moves(self, there: Collection[Part], phase: str, at: int = -1, working: int | None = 0) -> Moves:
        """What leaves and what comes for `phase` where `there` is on the device.

        at: the place of `phase` in `order`. working: see `predicted_bytes`; None: nobody knows yet, and everything
        else leaves.
        """
        needs = self.phases[phase].needs
        others = [part for part in sorted(there) if part not in needs]
        # The soonest needed first: of them as many stay as fit.
        others.sort(key=lambda part: (self._next_use(part, at)[0], -leaves_at(part)))
        leave = [] if self.budget is None else self._too_much(others, phase, working)
        return Moves(
            {part: not self._next_use(part, at)[1] for part in leave},
            tuple(part for part in sorted(needs) if part not in there),
        )

    def _too_much(self, others: Sequence[Part], phase: str, working: int | None) -> list[Part]:
        """Of `others`, the soonest needed first, those that do not fit beside the phase; the last needed first."""
        assert self.budget is not None
        room = 0 if working is None else self.budget - self.predicted_bytes(phase, working)
        leave: list[Part] = []
        for part in others:
            weights = (part[0], "weights")
            if self.sizes[part] <= room and not (part[1] == "cache" and weights in leave):
                room -= self.sizes[part]
            else:
                leave.append(part)
        return leave[::-1]

    def _next_use(self, part: Part, at: int) -> tuple[int, bool]:
        """In how many phases `part` is needed again, and whether it is overwritten there."""
        for ahead in range(1, len(self.order) + 1):
            phase = self.phases.get(self.order[(at + ahead) % len(self.order)])
            if phase is not None and part in phase.needs:
                return ahead, part in phase.overwrites
        return len(self.order) + 1, False


def leaves_at(part: Part) -> int:
    """Its place in `LEAVE_FIRST`."""
    kind = part[1]
    return LEAVE_FIRST.index(kind) if kind in LEAVE_FIRST else len(LEAVE_FIRST)
