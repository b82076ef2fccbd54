"""Weight syncs between two worlds: a pool that trains and a pool that generates, which share no process group.

    training pool   ranks 0 .. n-1        layout ──┐  store, once                 ┌── plan: the same on all ranks
    rollout pool    ranks n .. n+m-1      trace  ──┴──────────────────────────────┘
                        │
    every sync      link.meet ─> version (and, without a trace, checksums) from rank 0 ─> WeightSync over the link

Rank numbers count over both pools. It is the same plan, exchange and verification as inside one world (sync.py);
where a rank's loader cannot be traced, whole tensors go over the same link, bucket by bucket, into vLLM's loader.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.config import RolloutConfig
from rlhf_dist.reshard.layout import Layout, LayoutError, ParameterLayout
from rlhf_dist.reshard.plan import Plan, make_plan
from rlhf_dist.wire import Meeting, WorkerContext
from workers.engines.generation import Bucket, GenerationEngine, Untraceable
from workers.engines.training import TrainingEngine
from workers.reshard.link import Link, rendezvous
from workers.reshard.sync import SyncReport, WeightSync
from workers.reshard.target import target_layout, traced

_log = logging.getLogger(__name__)


class Sender:
    """A training rank's end. All ranks of both pools construct theirs and call `run` at the same time."""

    def __init__(self, engine: TrainingEngine, config: RolloutConfig, context: WorkerContext, meeting: Meeting) -> None:
        """Waits for the other pool's layout. Raises DistError where a rank does not come in time."""
        self._engine, self._dtype = engine, getattr(torch, config.dtype)
        own = engine.layout().as_dtype(config.dtype).renumbered(range(meeting.senders), meeting.world)
        self._between = _Between(config, context, meeting, own)

    def run(self, must_change: bool) -> SyncReport:
        """Send the weights; see ColocatedSync.run."""
        between, version = self._between, self._engine.version
        started = time.perf_counter()
        if between.sync is not None:
            between.announce(version, {})
            return between.sync.run(version, self._engine.local_shards(), {}, must_change=must_change)
        between.announce(version, self._engine.checksums(self._dtype))
        shards = self._engine.local_shards()
        for names, sync in between.bucket_syncs:
            sync.run(version, {name: shards[name] for name in names if name in shards}, {})
        return SyncReport(version, len(between.source.parameters), 0, time.perf_counter() - started)


class Receiver:
    """A generating rank's end."""

    def __init__(
        self, rollout: GenerationEngine, config: RolloutConfig, context: WorkerContext, meeting: Meeting
    ) -> None:
        """Waits for the other pool's layout. Raises DistError where a rank does not come in time."""
        self._rollout, self._dtype = rollout, getattr(torch, config.dtype)
        self._device = torch.device(context.device)
        self._between = _Between(config, context, meeting, rollout)

    def run(self) -> SyncReport:
        """Take the weights, verified. Raises RuntimeErrors that say what is wrong and where; the generation engine
        then refuses to generate until a sync succeeds."""
        between = self._between
        version, expected = between.announce(None, {})
        if between.sync is None:
            report = self._rollout.receive_weights(version, self._buckets(version), expected)
            return SyncReport(version, report.parameters, report.bytes, report.seconds)
        sync, reports = between.sync, []
        self._rollout.receive_shards(
            version,
            lambda target, prepare, finish: reports.append(
                sync.run(version, {}, target, prepare=prepare, finish=finish)
            ),
        )
        return reports[0]

    def _buckets(self, version: int) -> Iterator[Bucket]:
        source = self._between.source.parameters
        for names, sync in self._between.bucket_syncs:
            whole: Mapping[str, list[Tensor]] = {
                name: [torch.empty(source[name].shape, dtype=self._dtype, device=self._device)] for name in names
            }
            sync.run(version, {}, dict(whole))
            yield [(name, pieces[0]) for name, pieces in whole.items()]


class _Between:
    """What both ends share: the link, the source layout, and the plan or why there is none."""

    def __init__(
        self, config: RolloutConfig, context: WorkerContext, meeting: Meeting, end: Layout | GenerationEngine
    ) -> None:
        """end: the source layout on a sender, the engine to be filled on a receiver."""
        self._config, self._meeting = config, meeting
        timeout_s = context.sync_timeout_s
        store = rendezvous(meeting.address, meeting.port, hosts=meeting.rank == 0, timeout_s=timeout_s)

        def get(key: str) -> Any:
            store.wait([key], timedelta(seconds=timeout_s))
            return pickle.loads(store.get(key))

        if meeting.rank == 0:
            store.set("source", pickle.dumps(end))
        self.source: Layout = end if isinstance(end, Layout) else get("source")
        if not isinstance(end, Layout):
            store.set(f"target/{meeting.rank}", pickle.dumps(traced(end, self.source)))
        parts = [get(f"target/{rank}") for rank in range(meeting.senders, meeting.world)]
        device = torch.device(context.device)
        self._link = Link(store, "two worlds", meeting.rank, meeting.world, device, timeout_s, reaches=meeting.address)
        self.sync: WeightSync | None = None
        try:
            wanted = target_layout(self.source, [{}] * meeting.senders + parts)
            self.sync = self._sync(make_plan(self.source, wanted, meeting.nodes))
        except (Untraceable, LayoutError) as error:
            if meeting.rank == 0:
                _log.warning("weight syncs send whole tensors, since %s", error)

    def announce(self, version: int | None, checksums: Mapping[str, int]) -> tuple[int, dict[str, int]]:
        """Tell the receivers which version comes, and its checksums where whole tensors are sent."""
        self._link.meet()
        self._link.phase = "announce"
        names = [] if self.sync is not None else list(self.source.parameters)
        values = torch.zeros(1 + len(names), dtype=torch.int64)
        if self._meeting.rank == 0:
            assert version is not None, "rank 0 sends"
            values[0] = version
            values[1:] = torch.tensor([_signed(checksums[name]) for name in names], dtype=torch.int64)
        told = self._link.all_reduce_sum(values).tolist()
        return told[0], {name: total & _MASK for name, total in zip(names, told[1:], strict=True)}

    @cached_property
    def bucket_syncs(self) -> list[tuple[list[str], WeightSync]]:
        """Names of whole parameters of at most `bucket_bytes` together (or one), and the sync that moves them."""
        receivers, found = range(self._meeting.senders, self._meeting.world), []
        for names in _buckets(self.source, self._config.bucket_bytes):
            some = {name: self.source.parameters[name] for name in names}
            whole = {
                name: ParameterLayout.from_boxes(
                    p.shape, p.dtype, [(rank, tuple((0, size) for size in p.shape)) for rank in receivers]
                )
                for name, p in some.items()
            }
            world = self._meeting.world
            plan = make_plan(Layout(world, some), Layout(world, whole), self._meeting.nodes)
            found.append((names, self._sync(plan)))
        return found

    def _sync(self, plan: Plan) -> WeightSync:
        return WeightSync(plan, self._meeting.rank, self._config.bucket_bytes, self._link)


_MASK = 0xFFFF_FFFF_FFFF_FFFF


def _signed(checksum: int) -> int:
    return checksum - (1 << 64) if checksum >> 63 else checksum


def _buckets(layout: Layout, most_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, p in layout.parameters.items():
        nbytes = torch.Size(p.shape).numel() * p.item_bytes
        if names and held + nbytes > most_bytes:
            yield names
            names, held = [], 0
        names.append(name)
        held += nbytes
    if names:
        yield names
