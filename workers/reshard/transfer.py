"""Weights from one training engine to another, of the same processes or of another pool.

    source engine    layout, local shards ──┐  routes (once) ─> every transfer: pieces only, verified       (sync.py)
    target engine    layout, its masters  ──┘

    copy      pieces arrive in the target's master weights
    mix       they arrive beside them, and w <- (1 - tau) w + tau * other is computed there, in float32
    merge     one after the other, added up

What is sent of a model with adapters is the sum of both. Every rank of both engines constructs its end and calls `run`
alike; what is written is used only after all have verified it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_dist.reshard.encoding import layout_from_json, layout_to_json
from rlhf_dist.reshard.layout import Layout
from rlhf_dist.reshard.rounds import default_bucket_bytes
from rlhf_dist.reshard.routes import make_routes
from rlhf_dist.reshard.shards import Shards
from rlhf_dist.wire import Bridge
from workers.engines.training.interface import TrainingEngine
from workers.network import own_address, rendezvous
from workers.reshard.link import Link
from workers.reshard.sync import SyncReport, WeightSync


class WeightTransfer:
    """One rank's end."""

    def __init__(
        self,
        source: TrainingEngine | None,
        target: TrainingEngine | None,
        link: Link | None,
        rank: int,
        ranks: tuple[Sequence[int], Sequence[int]],
        nodes: Sequence[int],
        device: torch.device,
    ) -> None:
        """Collective: makes the routes. source, target: None on a rank that has only the other. link: None for one rank
        alone. ranks: of the source's and the target's group, among all. nodes: machine of each rank.

        Raises LayoutError for models that differ in names or shapes.
        """
        self._source, self._target, self._link, self._rank = source, target, link, rank
        if link is None:
            assert source is not None and target is not None, "a rank alone holds both ends"
            sent, held = source.layout(), target.layout()
        else:
            link.meet()
            with link.kept_while("routes"):
                sent, held = (self._told(one, mine) for one, mine in zip((source, target), ranks, strict=True))
        routes = make_routes(_in_dtypes_of(held, sent), held, nodes)
        self._layout, bucket_bytes = held, default_bucket_bytes(device.type)
        self._sync = WeightSync(routes, rank, bucket_bytes, link)
        self.staging_bytes = int(held.bytes_per_rank()[rank])
        """Of a copy of what this rank holds of the target's master weights."""

    @property
    def buffer_bytes(self) -> int:
        """Memory that this rank's messages take."""
        return self._sync.buffer_bytes

    def run(self, into: Shards) -> SyncReport:
        """Move the source's weights, verified. into: shards of the target's layout; {} on a rank without.

        Raises SyncFailed and SyncStopped, on all ranks.
        """
        if self._link is not None:
            self._link.meet()
        version = self._source.version if self._source is not None else None
        return self._sync.run(version, self._source.local_shards() if self._source is not None else {}, into)

    def _told(self, engine: TrainingEngine | None, ranks: Sequence[int]) -> Layout:
        """The layout of an engine whose ranks are those, as the first of them tells it to all."""
        assert self._link is not None, "told over a link"
        mine = engine.layout().renumbered(ranks, self._link.world) if engine is not None else None
        return layout_from_json(self._link.broadcast_json(mine and layout_to_json(mine), ranks[0]))


def bridged(
    source: TrainingEngine | None,
    target: TrainingEngine | None,
    bridge: Bridge,
    rank: int,
    name: str,
    device: torch.device,
) -> WeightTransfer:
    """A transfer between two pools; rank: in one's own. Exactly one engine is given."""
    sends = source is not None
    hosts = sends and rank == 0
    store = rendezvous(bridge.address, bridge.port, hosts, bridge.timeout_s, bridge.secret)
    among = rank if sends else bridge.senders + rank
    host = bridge.address if among == 0 else own_address(bridge.address)
    link = Link(store, name, among, bridge.world, device, bridge.timeout_s, host)
    ranks = (range(bridge.senders), range(bridge.senders, bridge.world))
    return WeightTransfer(source, target, link, among, ranks, bridge.nodes or (0,) * bridge.world, device)


@torch.no_grad()
def mix(weights: Shards, others: Shards, tau: float) -> None:
    """weights <- (1 - tau) weights + tau others, in float32, in place."""
    for mine, theirs in _pairs(weights, others):
        mine.copy_(mine.float() * (1.0 - tau) + theirs.float() * tau)


@torch.no_grad()
def add(total: Shards, others: Shards, factor: float) -> None:
    """total <- total + factor * others; total in float32."""
    for mine, theirs in _pairs(total, others):
        mine.add_(theirs.float() * factor)


@torch.no_grad()
def assign(weights: Shards, values: Shards) -> None:
    """weights <- values, in place."""
    for mine, theirs in _pairs(weights, values):
        mine.copy_(theirs)


def beside(shards: Shards, dtype: torch.dtype | None = None) -> dict[str, list[Tensor]]:
    """Memory of the shape of some shards, and of their dtype unless another is said; zeros."""
    return {
        name: [torch.zeros(shard.shape, dtype=dtype or shard.dtype, device=shard.device) for shard in held]
        for name, held in shards.items()
    }


def _pairs(left: Shards, right: Shards) -> list[tuple[Tensor, Tensor]]:
    return [pair for name, held in left.items() for pair in zip(held, right[name], strict=True)]


def _in_dtypes_of(held: Layout, sent: Layout) -> Layout:
    """What is sent in the dtypes of what is held: values are cast before they travel."""
    cast = {
        name: replace(p, dtype=held.parameters[name].dtype) if name in held.parameters else p
        for name, p in sent.parameters.items()
    }
    return Layout(sent.world, cast)
