"""Parallel strategies: how a role's weights are spread over the GPUs of its pool, and how it generates.

A training or inference holding of n GPUs is tp x sp x pp x dp. tp shares every matrix, sp (Ulysses) shares
sequences, pp shares layers; over dp x sp, ZeRO shards optimizer state (1), gradients (2) and parameters (3;
what FSDP2 does). tp and sp stay inside a node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from rlhf_dist.model_specs import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a role is held, trained and asked for log-probs or values."""

    gpus: int
    tp: int = 1
    sp: int = 1
    pp: int = 1
    zero: int = 3
    """0: a full copy on every dp rank; 1, 2, 3: ZeRO stages. A frozen role has 0 or 3."""
    offload: bool = False
    """Optimizer state of a trained role, weights of a frozen one, in the host's memory while not used."""

    @cached_property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.gpus // (self.tp * self.sp * self.pp)

    @property
    def text(self) -> str:
        """Short form, for tables."""
        axes = [f"{name}{size}" for name, size in (("tp", self.tp), ("sp", self.sp), ("pp", self.pp)) if size > 1]
        axes.append(f"dp{self.dp}")
        kind = f"zero{self.zero}" if self.zero else "replicated"
        return " ".join([*axes, kind, *(["offload"] if self.offload else [])])


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How a role generates: replicas of tp x pp GPUs, each with its share of the rows."""

    gpus: int
    tp: int = 1
    pp: int = 1

    @property
    def replicas(self) -> int:
        """Copies of the model."""
        return self.gpus // (self.tp * self.pp)

    @property
    def text(self) -> str:
        """Short form, for tables."""
        axes = [f"tp{self.tp}"] + ([f"pp{self.pp}"] if self.pp > 1 else [])
        return " ".join([*axes, f"x{self.replicas}"])


@dataclass(frozen=True, kw_only=True)
class Space:
    """Which strategies the search may use."""

    pipeline: tuple[int, ...] = (1,)
    """pp sizes. The training engines of this system (FSDP2, DeepSpeed ZeRO) have no pipeline, so the default is 1."""
    offload: bool = True
    """Whether state may be moved to the host."""
    tensor: bool = True
    """Whether training and inference may share matrices (tp)."""
    sequence: bool = True
    """Whether training may share sequences (sp)."""
    frozen_sequence: bool = False
    """Whether roles that do not learn may share sequences: with rows in plenty it only adds collectives."""
    zero: tuple[int, ...] = (1, 2, 3)
    """ZeRO stages of trained roles."""
    frozen_zero: tuple[int, ...] = (0, 3)
    """Full copies, or parameters sharded, of roles that do not learn."""
    plain_zero: bool = False
    """ZeRO-1 and offloading only without tp and sp: here DeepSpeed does them, and it has neither."""
    reallocate: bool = True
    """Whether inference of a trained role may copy its weights to a holding of its own."""
    generation_pipeline: bool = True
    """Whether generation may share layers where a node cannot hold the model."""


def training_strategies(model: ModelSpec, gpus: int, gpus_per_node: int, space: Space) -> Iterator[Strategy]:
    """All holdings of a trained role on `gpus` GPUs."""
    for tp, sp in _axes(model, gpus, gpus_per_node):
        if (tp > 1 and not space.tensor) or (sp > 1 and not space.sequence):
            continue
        for pp in space.pipeline:
            if gpus % (tp * sp * pp) or pp > model.layers:
                continue
            # On a single rank all stages are the same.
            for zero in space.zero if gpus > tp * pp else space.zero[-1:]:
                for offload in (False, True) if space.offload else (False,):
                    if space.plain_zero and tp * sp > 1 and (zero == 1 or offload):
                        continue
                    yield Strategy(gpus=gpus, tp=tp, sp=sp, pp=pp, zero=zero, offload=offload)


def frozen_strategies(model: ModelSpec, gpus: int, gpus_per_node: int, space: Space) -> Iterator[Strategy]:
    """All holdings of a role that does not learn."""
    for tp, sp in _axes(model, gpus, gpus_per_node):
        if (sp > 1 and not space.frozen_sequence) or (tp > 1 and not space.tensor):
            continue
        for pp in space.pipeline:
            if gpus % (tp * sp * pp) or pp > model.layers:
                continue
            for zero in space.frozen_zero if gpus > tp * pp else space.frozen_zero[:1]:
                for offload in (False, True) if space.offload else (False,):
                    yield Strategy(gpus=gpus, tp=tp, sp=sp, pp=pp, zero=zero, offload=offload)


def generation_strategies(model: ModelSpec, gpus: int, gpus_per_node: int, space: Space) -> Iterator[Generation]:
    """All ways of generating on `gpus` GPUs; pp only with tp over a whole node, for models that need more."""
    for tp, sp in _axes(model, gpus, gpus_per_node):
        if sp == 1:
            for pp in (1, 2, 4, 8) if space.generation_pipeline and tp == gpus_per_node else (1,):
                if gpus % (tp * pp) == 0 and pp <= model.layers:
                    yield Generation(gpus=gpus, tp=tp, pp=pp)


@cache
def _axes(model: ModelSpec, gpus: int, gpus_per_node: int) -> tuple[tuple[int, int], ...]:
    """(tp, sp) pairs that divide heads, the pool and a node; Megatron's tp already spreads sequences, so not both."""
    sizes = [
        size
        for size in (1, 2, 4, 8, 16)
        if size <= gpus_per_node and gpus % size == 0 and model.heads % size == 0 and gpus_per_node % size == 0
    ]
    return tuple([(size, 1) for size in sizes] + [(1, size) for size in sizes if size > 1])
