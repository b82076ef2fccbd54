"""Engines as tenants of a device: what each holds by kind, and how that leaves and comes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

from workers.engines.generation.interface import GenerationEngine, SleepPart
from workers.engines.movable import Movable


class Tenant(Protocol):
    """What the arbiter moves."""

    kinds: tuple[str, ...]
    """What moves, in the order in which it may leave one by one."""

    def held(self) -> Mapping[str, int]:
        """Kind -> bytes on the device now, as the storages say; what cannot leave too."""
        ...

    def leave(self, kind: str, keep: bool) -> int:
        """Give the device's bytes back; keep False: the contents are not wanted again. Returns bytes copied."""
        ...

    def come(self, kind: str) -> int:
        """Take them again. Returns bytes copied."""
        ...

    def written(self, kind: str) -> None:
        """The contents are about to change."""
        ...


class TrainingTenant:
    """A training engine, or a frozen model."""

    def __init__(self, parts: Mapping[str, Movable]) -> None:
        self._parts = dict(parts)
        self.kinds = tuple(kind for kind in ("buckets", "gradients", "optimizer", "parameters") if kind in self._parts)

    def held(self) -> Mapping[str, int]:
        """See Tenant."""
        fixed = sum(part.fixed_bytes for part in self._parts.values())
        return {kind: part.held_bytes for kind, part in self._parts.items()} | {"fixed": fixed}

    def leave(self, kind: str, keep: bool) -> int:
        """See Tenant."""
        return self._parts[kind].leave(keep)

    def come(self, kind: str) -> int:
        """See Tenant."""
        return self._parts[kind].come()

    def written(self, kind: str) -> None:
        """See Tenant."""
        self._parts[kind].written()


class GenerationTenant:
    """A generation engine, which knows best how its own memory leaves."""

    def __init__(self, engine: GenerationEngine, *, sleeps: bool) -> None:
        """sleeps: whether it gives anything back."""
        self._engine = engine
        there = engine.held_bytes() if sleeps else {}
        self.kinds: tuple[str, ...] = tuple(kind for kind in ("cache", "weights") if kind in there)

    def held(self) -> Mapping[str, int]:
        """See Tenant."""
        return {str(kind): nbytes for kind, nbytes in self._engine.held_bytes().items()}

    def leave(self, kind: str, keep: bool) -> int:
        """See Tenant."""
        return self._engine.sleep([cast(SleepPart, kind)], keep=keep)

    def come(self, kind: str) -> int:
        """See Tenant."""
        return self._engine.wake([cast(SleepPart, kind)])

    def written(self, kind: str) -> None:
        """See Tenant. The engine is written through its own methods, and knows."""
