"""The worker's side of `rlhf_dist/weights.py`: weights that come from other roles, and sets kept under a name."""

from __future__ import annotations

from functools import cached_property

import torch

from rlhf_dist.batch import Batch
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.placement.phases import way_of
from rlhf_dist.reshard.shards import Shards
from rlhf_dist.wire import Bridge, Call, OpResult, WorkerContext
from workers.engines.training.interface import TrainingEngine
from workers.memory.arbiter import Arbiter
from workers.reshard.colocated import new_link
from workers.reshard.sync import SyncReport
from workers.reshard.transfer import WeightTransfer, add, assign, beside, bridged, mix

NOTHING = Batch({}, 0)


class WeightSets:
    """One rank of a role with a training engine, as other roles' weights and named sets see it."""

    context: WorkerContext
    engine: TrainingEngine
    memory: Arbiter
    moved: bool
    rewritten: bool
    """Its weights were written by something other than a step since they were last synced."""

    @cached_property
    def _ways(self) -> dict[tuple[str, str], WeightTransfer]:
        return {}

    def connect_weights(self, source: str, target: str, bridge: Bridge | None, staged: int) -> None:
        """Plan the way from `source` to `target`, one of which this role is; all ranks of both do.

        bridge: between two pools; None: both are in this one, and only the target's worker is called. staged: how many
        copies of its weights the target needs beside them. Raises LayoutError for models that differ.
        """
        device, rank, phase = torch.device(self.context.device), self.context.rank, way_of(source, target)
        is_target = self.context.role == target
        if bridge is None:
            nodes = self.context.nodes or (0,) * self.context.world
            ranks, theirs = range(self.context.world), self.context.peers[source].engine
            link = new_link(self.context, device)
            way = WeightTransfer(theirs, self.engine, link, rank, (ranks, ranks), nodes, device)
        else:
            sender, receiver = (None, self.engine) if is_target else (self.engine, None)
            way = bridged(sender, receiver, bridge, rank, phase, device)
        self._ways[source, target] = way
        reads = {self.context.role: "parameters"} | ({source: "parameters"} if bridge is None else {})
        self.memory.add_sync(
            phase,
            reads,
            overwrites=False,
            buckets=way.buffer_bytes + (staged * way.staging_bytes if is_target else 0),
        )

    def give_weights(self, batch: Batch, call: Call, *, target: str) -> OpResult:
        """Send this role's weights to `target`, in another pool, whose ranks take them meanwhile."""
        self.memory.turn(way_of(self.context.role, target))
        self._ways[self.context.role, target].run({})
        return OpResult(columns=NOTHING)

    def copy_from(self, batch: Batch, call: Call, *, source: str) -> OpResult:
        """See `Weights.copy_from`."""
        return self._written([self._take(source, self._masters([source]))])

    def mix_from(self, batch: Batch, call: Call, *, source: str, tau: float) -> OpResult:
        """See `Weights.mix_from`."""
        if not 0 <= tau <= 1:
            raise ValueError(f"mix_from needs tau in [0, 1], the share that comes from {source!r}; got {tau}")
        masters = self._masters([source])
        others = beside(masters)
        report = self._take(source, others)
        mix(masters, others, tau)
        return self._written([report])

    def merge_from(self, batch: Batch, call: Call, *, sources: tuple[tuple[str, float], ...]) -> OpResult:
        """See `Weights.merge_from`."""
        masters = self._masters([source for source, _ in sources if source != self.context.role])
        total, others = beside(masters, torch.float32), beside(masters)
        reports = []
        for source, factor in sources:
            if source == self.context.role:
                add(total, masters, factor)
            else:
                reports.append(self._take(source, others))
                add(total, others, factor)
        assign(masters, total)
        return self._written(reports)

    def save_weights(self, batch: Batch, call: Call, *, name: str, optimizer: bool) -> OpResult:
        """See `Weights.save_weights`."""
        self.engine.save_weights(name, optimizer=optimizer)
        return OpResult(columns=NOTHING)

    def restore_weights(self, batch: Batch, call: Call, *, name: str) -> OpResult:
        """See `Weights.restore_weights`."""
        self.engine.restore_weights(name)
        return self._written([])

    def must_change(self) -> bool:
        """Whether the weights have to differ from those of the last sync, which comes now; forgets why."""
        told, self.moved, self.rewritten = self.moved and not self.rewritten, False, False
        return told

    def _masters(self, sources: list[str]) -> Shards:
        """This rank's views of its master weights, on the device together with those of the first source."""
        if sources:
            self.memory.turn(way_of(sources[0], self.context.role))
        else:
            self.engine.before_use("write")
        return self.engine.local_shards("base")

    def _take(self, source: str, into: Shards) -> SyncReport:
        self.memory.turn(way_of(source, self.context.role))
        return self._ways[source, self.context.role].run(into)

    def _written(self, reports: list[SyncReport]) -> OpResult:
        self.engine.before_use("write")
        self.engine.weights_written()
        self.rewritten = True
        metrics: Metrics = {}
        if reports and self.context.rank == 0:
            metrics = {
                "copy_seconds": Mean(sum(report.seconds for report in reports), 1),
                "copy_bytes": Mean(float(sum(report.bytes_received for report in reports)), 0),
            }
        return OpResult(columns=NOTHING, metrics=metrics)
