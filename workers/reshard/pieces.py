"""Syncs by pieces of a training engine's weights; of a model with adapters, of the adapters alone.

trained whole   layout("merged") ────────────────────────────> target shards

adapters        layout("base") ──(when its bits changed)─────> target shards ──> a copy is kept, in host memory
                layout("adapters") ──(every sync, whole)──> B, A
                                       target shard [rows, columns] = kept + scale * B[rows] A[:, columns]

Whether the base has changed is no guess: its checksums are added up in every sync, and moved where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_dist.reshard.layout import Layout
from rlhf_dist.reshard.routes import make_routes
from rlhf_dist.reshard.shards import Shards
from workers.engines.training.interface import TrainingEngine
from workers.reshard.link import Link
from workers.reshard.offer import Offer, Wanted, pair_of, whole_on
from workers.reshard.sync import SyncReport, WeightSync


class PieceSync:
    """One rank's part, whether it trains, generates or both. Every rank calls `run` alike."""

    def __init__(
        self,
        offer: Offer,
        wanted: Sequence[Wanted | str | None],
        nodes: Sequence[int],
        rank: int,
        bucket_bytes: int,
        link: Link | None,
        device: torch.device,
    ) -> None:
        """All ranks give the same offer (ranks counted over both sides), wanted and nodes.

        Raises Untraceable and LayoutError as `pair_of` does, before anything moves.
        """
        source, target = pair_of(offer.weights, wanted)
        self._rank, self._target = rank, target
        self._weights = WeightSync(make_routes(source, target, nodes), rank, bucket_bytes, link)
        self._adapters = offer.adapters
        self._changes: WeightSync | None = None
        if offer.adapter_weights is not None:
            receivers = [r for r, part in enumerate(wanted) if part is not None]
            whole = whole_on(offer.adapter_weights, receivers)
            self._changes = WeightSync(make_routes(offer.adapter_weights, whole, nodes), rank, bucket_bytes, link)
            self._received = empty_shards(whole, rank, device)
        self._kept: dict[str, list[Tensor]] = {}

    @property
    def planned_bytes(self) -> int:
        """What this rank receives when all weights move."""
        return int(self._weights.routes.moved[self._rank])

    @property
    def buffer_bytes(self) -> int:
        """Most memory that messages take on this rank."""
        return max(sync.buffer_bytes for sync in (self._weights, self._changes) if sync is not None)

    @property
    def overwrites(self) -> bool:
        """Whether every sync writes all weights."""
        return self._changes is None

    def run(
        self,
        version: int | None,
        engine: TrainingEngine | None,
        target: Shards,
        prepare: Callable[[], None] | None,
        finish: Callable[[int], None] | None,
        must_change: bool,
    ) -> SyncReport:
        """One sync; the link has met. engine: None on a rank that only generates, which gives version None too.

        target, prepare, finish: of the generation engine ({} and None on a rank without). Raises SyncFailed and
        SyncStopped.
        """
        if self._changes is None:
            source = engine.local_shards() if engine else {}
            return self._weights.run(version, source, target, prepare=prepare, finish=finish, must_change=must_change)
        moved = self._weights.run(
            version,
            engine.local_shards("base") if engine else {},
            target,
            prepare=prepare,
            finish=lambda _: self._keep(target),
            skip_unchanged=True,
        )

        def merge(agreed: int) -> None:
            self._merge(target)
            if finish:
                finish(agreed)

        changed = self._changes.run(
            version,
            engine.local_shards("adapters") if engine else {},
            self._received,
            prepare=prepare,
            finish=merge,
            must_change=must_change,
        )
        return replace(
            changed,
            parameters=moved.parameters + changed.parameters,
            bytes_received=moved.bytes_received + changed.bytes_received,
            seconds=moved.seconds + changed.seconds,
        )

    def _keep(self, target: Shards) -> None:
        # The generation model holds merged weights from now on, and adding to them step after step would drift.
        self._kept = {
            name: [shard.to("cpu", copy=True) for shard in target[name]] for name in self._adapters if name in target
        }

    @torch.no_grad()
    def _merge(self, target: Shards) -> None:
        for name, kept in self._kept.items():
            adapter = self._adapters[name]
            [down], [up] = self._received[adapter.down], self._received[adapter.up]
            boxes = self._target.parameters[name].boxes_of(self._rank)
            for shard, base, box in zip(target[name], kept, boxes, strict=True):
                change = adapter.change(down, up, box)
                shard.copy_(base.to(change) + change)


def empty_shards(layout: Layout, rank: int, device: torch.device) -> dict[str, list[Tensor]]:
    """Tensors for all boxes of one rank."""
    return {
        name: [
            torch.empty([stop - start for start, stop in box], dtype=getattr(torch, p.dtype), device=device)
            for box in p.boxes_of(rank)
        ]
        for name, p in layout.parameters.items()
    }
