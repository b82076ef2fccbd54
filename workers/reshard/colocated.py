"""Weight syncs of an actor whose training and generation engines share their processes (HybridFlow's HybridEngine).

training layout ─┐
                 ├─> plan (once) ─> every sync: pieces only, verified          (sync.py)
traced layout  ──┘
no trace?  whole tensors through vLLM's loader, verified as well; said once in the log
"""

from __future__ import annotations

import logging
import time
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from rlhf_dist.config import RolloutConfig
from rlhf_dist.reshard.layout import Layout, LayoutError
from rlhf_dist.reshard.plan import make_plan
from rlhf_dist.wire import WorkerContext
from workers.engines.generation import GenerationEngine, Untraceable
from workers.engines.training import TrainingEngine
from workers.reshard.link import Link
from workers.reshard.sync import SyncReport, WeightSync
from workers.reshard.target import target_layout, traced

_log = logging.getLogger(__name__)


class ColocatedSync:
    """One rank's end. Every rank of the pool constructs it and calls `run` alike."""

    def __init__(
        self, engine: TrainingEngine, rollout: GenerationEngine, config: RolloutConfig, context: WorkerContext
    ) -> None:
        """Collective: gathers what every rank wants and makes the plan."""
        self._engine, self._rollout, self._config = engine, rollout, config
        self._dtype = getattr(torch, config.dtype)
        self._sync: WeightSync | None = None
        self.fallback: str | None = None
        """Why whole tensors are sent; None where they are not."""
        source = engine.layout().as_dtype(config.dtype)
        nodes = context.nodes or (0,) * context.world
        try:
            target = _target(rollout, source, context.world)
            plan = make_plan(source, target, nodes)
        except (Untraceable, LayoutError) as error:
            self.fallback = str(error)
            if context.rank == 0:
                _log.warning("weight syncs send whole tensors, since %s", error)
            return
        self._sync = WeightSync(plan, context.rank, config.bucket_bytes, _link(context))

    def run(self, must_change: bool) -> SyncReport:
        """Move the trainer's weights to the generation engine, verified.

        must_change: a step was made since the last sync, so some weight has to differ. Raises RuntimeErrors that say
        what is wrong and where; the generation engine then refuses to generate until a sync succeeds.
        """
        version = self._engine.version
        if self._sync is None:
            return self._whole_tensors(version)
        sync, reports = self._sync, []
        source = self._engine.local_shards()

        self._rollout.receive_shards(
            version,
            lambda target, prepare, finish: reports.append(
                sync.run(version, source, target, prepare=prepare, finish=finish, must_change=must_change)
            ),
        )
        return reports[0]

    def _whole_tensors(self, version: int) -> SyncReport:
        started = time.perf_counter()
        expected = self._engine.checksums(self._dtype)
        buckets = self._engine.full_weights(self._dtype, self._config.bucket_bytes)
        report = self._rollout.receive_weights(version, buckets, expected)
        return SyncReport(version, report.parameters, report.bytes, time.perf_counter() - started)


def _target(rollout: GenerationEngine, source: Layout, world: int) -> Layout:
    """What all ranks want; raises Untraceable on all of them where one says so."""
    told: list[Any] = [None] * world
    dist.all_gather_object(told, traced(rollout, source))
    return target_layout(source, told)


def _link(context: WorkerContext) -> Link | None:
    if context.world == 1:
        return None
    # A name of its own each time: the store still knows the addresses of every link before.
    name = [uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    store = dist.distributed_c10d._get_default_store()
    return Link(store, name[0], context.rank, context.world, torch.device(context.device), context.sync_timeout_s)
