"""Weight syncs between two worlds: the ranks of a training pool send, those of a generation pool receive.

    training pool     rank 0..p-1   TrainingEnd     ──┐  one link over all p + q ranks, senders first;
    generation pool   rank 0..q-1   GenerationEnd   ──┘  neither side knows the other's process group

    first sync    names, shapes and layout to the generating ranks, the boxes they want back; all make the same routes
    every sync    pieces only, from every training rank, verified on all p + q                        (pieces.py)
    no trace?     whole tensors, bucket by bucket, through the generation engine's loader; verified as well

Both ends are constructed, and both call `run`, at about the same time; whoever is alone says so after the time-out,
and the next `run` of both starts afresh. A pool that was built anew gets new ends, on both sides.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from rlhf_dist.config import RolloutConfig
from rlhf_dist.reshard.layout import Layout
from rlhf_dist.reshard.rounds import default_bucket_bytes, rounds_of
from rlhf_dist.reshard.routes import make_routes
from rlhf_dist.reshard.shards import Shards
from rlhf_dist.wire import Bridge
from workers.engines.generation.interface import Bucket, GenerationEngine, Untraceable
from workers.engines.training.interface import TrainingEngine
from workers.network import own_address, rendezvous
from workers.reshard.canary import send_canary
from workers.reshard.exchange import exchange
from workers.reshard.link import Link
from workers.reshard.offer import Offer, Wanted, offer_of, wanted_by, wanted_from_json, whole_on
from workers.reshard.pieces import PieceSync, empty_shards
from workers.reshard.sync import SyncFailed, SyncReport, check_changed

_log = logging.getLogger(__name__)


class _End(ABC):
    """What both sides do alike."""

    def __init__(self, bridge: Bridge, rank: int, config: RolloutConfig, device: torch.device) -> None:
        self._bridge, self._rank, self._config, self._device = bridge, rank, config, device
        store = rendezvous(bridge.address, bridge.port, rank == 0, bridge.timeout_s, bridge.secret)
        host = bridge.address if rank == 0 else own_address(bridge.address)
        self._link = Link(store, "bridge", rank, bridge.world, device, bridge.timeout_s, host)
        self.bucket_bytes = config.bucket_bytes or default_bucket_bytes(device.type)
        self._routes: PieceSync | _WholeTensors | None = None
        self.fallback: str | None = None
        """Why whole tensors are sent; None where they are not."""

    def _meet(self) -> PieceSync | _WholeTensors:
        """All ranks of both sides there, and routes that all of them have."""
        self._link.meet()
        with self._link.kept_while("routes"):
            # A rank whose last attempt ended before it had one makes the others make them again with it.
            planned = self._link.all_gather([0 if self._routes is None else 1])
            if self._routes is None or [0] in planned:
                self._routes = self._new_routes()
        return self._routes

    def _new_routes(self) -> PieceSync | _WholeTensors:
        mine = self._offer()
        offer = Offer.from_json(self._link.broadcast_json(mine.to_json() if mine else None, 0))
        wanted = [wanted_from_json(told) for told in self._link.gather_json(self._wanted(offer))]
        nodes = self._bridge.nodes or (0,) * self._bridge.world
        try:
            return PieceSync(offer, wanted, nodes, self._rank, self.bucket_bytes, self._link, self._device)
        except Untraceable as error:
            self.fallback = str(error)
            if self._rank == 0:
                _log.warning("weight syncs send whole tensors, since %s", error)
            dtype = getattr(torch, self._config.dtype)
            return _WholeTensors(
                offer.weights, self._bridge, self._rank, dtype, self.bucket_bytes, self._link, self._device
            )

    @abstractmethod
    def _offer(self) -> Offer | None: ...

    @abstractmethod
    def _wanted(self, offer: Offer) -> Wanted | str | None: ...


class TrainingEnd(_End):
    """The end of one training rank."""

    def __init__(self, engine: TrainingEngine, config: RolloutConfig, bridge: Bridge, rank: int, device: torch.device):
        """rank: in the training pool, which is the rank in the engine's group. Rank 0 hosts the store that all meet at;
        the others wait for it, at most the bridge's time-out."""
        super().__init__(bridge, rank, config, device)
        self._engine = engine

    def run(self, must_change: bool) -> SyncReport:
        """Send the trained weights; returns once every generation rank holds and has verified them.

        must_change: a step was made since the last sync, so some weight has to differ. Raises RuntimeErrors that say
        what is wrong and where, on all ranks of both sides.
        """
        routes = self._meet()
        if isinstance(routes, PieceSync):
            report = routes.run(self._engine.version, self._engine, {}, None, None, must_change)
        else:
            report = routes.send(self._engine, must_change)
        if self._config.canary_tolerance:
            with self._link.kept_while("canary"):
                send_canary(self._engine, None, self._config, self._link.gather_json)
        return report

    def _offer(self) -> Offer | None:
        offer = offer_of(self._engine, self._config.dtype)
        ranks, world = range(self._bridge.senders), self._bridge.world
        adapters = offer.adapter_weights
        return replace(
            offer,
            weights=offer.weights.renumbered(ranks, world),
            adapter_weights=adapters and adapters.renumbered(ranks, world),
        )

    def _wanted(self, offer: Offer) -> None:
        return None


class GenerationEnd(_End):
    """The end of one generation rank."""

    def __init__(
        self, rollout: GenerationEngine, config: RolloutConfig, bridge: Bridge, rank: int, device: torch.device
    ) -> None:
        """rank: in the generation pool."""
        super().__init__(bridge, bridge.senders + rank, config, device)
        self._rollout = rollout

    def run(self) -> SyncReport:
        """Receive, install and verify a version. Raises as the other end does; generation then refuses to serve."""
        self._rollout.refuse("the last weight sync did not complete")
        routes = self._meet()
        if isinstance(routes, _WholeTensors):
            report = routes.receive(self._rollout)
        else:
            report = self._pieces(routes)
        if self._config.canary_tolerance:
            with self._link.kept_while("canary"):
                send_canary(None, self._rollout, self._config, self._link.gather_json)
        return report

    def _pieces(self, routes: PieceSync) -> SyncReport:
        reports: list[SyncReport] = []

        def sync(target: Shards, prepare: Any, finish: Any) -> int:
            reports.append(routes.run(None, None, target, prepare, finish, must_change=False))
            return reports[0].version

        self._rollout.receive_shards(sync)
        return reports[0]

    def _offer(self) -> None:
        return None

    def _wanted(self, offer: Offer) -> Wanted | str | None:
        return wanted_by(self._rollout, offer.weights)


class _WholeTensors:
    """Every parameter whole to every generation rank, for a model that no trace expresses."""

    def __init__(
        self,
        weights: Layout,
        bridge: Bridge,
        rank: int,
        dtype: torch.dtype,
        bucket_bytes: int,
        link: Link,
        device: torch.device,
    ) -> None:
        self._rank, self._link, self._device, self._dtype = rank, link, device, dtype
        self._last: dict[str, int] | None = None
        self._under_way = False
        """Whether buckets are yet to come."""
        receivers = range(bridge.senders, bridge.world)
        self._buckets = []
        for part in _buckets(weights, bucket_bytes):
            whole = whole_on(part, receivers)
            routes = make_routes(part, whole, bridge.nodes or None)
            self._buckets.append((whole, rounds_of(routes, rank, bucket_bytes)))

    def send(self, engine: TrainingEngine, must_change: bool) -> SyncReport:
        started = time.perf_counter()
        with self._link.kept_while("announce"):
            expected = engine.checksums(self._dtype)
            if must_change:
                check_changed(engine.version, self._last, expected)
            self._link.broadcast_json([engine.version, expected], 0)
            shards = engine.local_shards()
            for _, steps in self._buckets:
                exchange(steps, shards, {}, self._link)
        self._commit(engine.version, None)
        self._last = expected
        return SyncReport(engine.version, len(shards), 0, time.perf_counter() - started)

    def receive(self, rollout: GenerationEngine) -> SyncReport:
        with self._link.kept_while("announce"):
            version, expected = self._link.broadcast_json(None, 0)
        failure: Exception | None = None
        self._under_way = True
        try:
            report = rollout.receive_weights(version, self._arriving(), expected)
        except Exception as error:
            if self._under_way:  # the others wait for this rank in the next round
                self._link.fail(error)
                raise
            failure = error
        try:
            self._commit(version, failure)
        except Exception:
            rollout.refuse(f"the sync of version {version} did not complete")
            raise
        return SyncReport(version, report.parameters, report.bytes, report.seconds)

    def _arriving(self) -> Iterator[Bucket]:
        for whole, steps in self._buckets:
            held = empty_shards(whole, self._rank, self._device)
            exchange(steps, {}, held, self._link)
            yield [(name, tensor) for name, [tensor] in held.items()]
        self._under_way = False

    def _commit(self, version: int, failure: Exception | None) -> None:
        if failure is not None and not self._link.is_open:
            raise failure
        self._link.phase = "commit"
        told = self._link.gather_json(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if failed := [f"rank {rank}: {text}" for rank, text in enumerate(told) if text is not None]:
            raise SyncFailed(f"version {version} failed on {'; '.join(failed)}")


def _buckets(weights: Layout, bucket_bytes: int) -> Iterator[Layout]:
    """Parameters of at most `bucket_bytes` together, or one that is larger."""
    names: list[str] = []
    size = 0
    for name, p in weights.parameters.items():
        new = int(p.volume[p.distinct[0]].sum()) * p.item_bytes
        if names and size + new > bucket_bytes:
            yield Layout(weights.world, {n: weights.parameters[n] for n in names})
            names, size = [], 0
        names.append(name)
        size += new
    yield Layout(weights.world, {n: weights.parameters[n] for n in names})
