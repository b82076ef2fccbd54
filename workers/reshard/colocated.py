"""Weight syncs of an actor whose training and generation engines share their processes (HybridFlow's HybridEngine).

training layout ─┐
                 ├─> routes (once) ─> every sync: pieces only, verified          (pieces.py)
traced layout  ──┘
no trace?  whole tensors through vLLM's loader, verified as well; said once in the log
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from rlhf_dist.config import RolloutConfig
from rlhf_dist.reshard.rounds import default_bucket_bytes
from rlhf_dist.reshard.shards import Shards
from rlhf_dist.wire import WorkerContext
from workers.engines.generation.interface import GenerationEngine, Untraceable
from workers.engines.training.interface import TrainingEngine
from workers.memory.arbiter import arbiter_of
from workers.reshard.canary import send_canary
from workers.reshard.link import Link
from workers.reshard.offer import offer_of, wanted_by, wanted_from_json
from workers.reshard.pieces import PieceSync
from workers.reshard.sync import SyncReport, check_changed

_log = logging.getLogger(__name__)


class ColocatedSync:
    """One rank's end. Every rank of the pool constructs it and calls `run` alike."""

    def __init__(
        self, engine: TrainingEngine, rollout: GenerationEngine, config: RolloutConfig, context: WorkerContext
    ) -> None:
        """Collective: gathers what every rank wants and makes the routes. Raises LayoutError."""
        self._engine, self._rollout, self._config = engine, rollout, config
        self._link: Link | None = None
        self.pieces: PieceSync | None = None
        self.fallback: str | None = None
        """Why whole tensors are sent; None where they are not."""
        offer = offer_of(engine, config.dtype)
        nodes = context.nodes or (0,) * context.world
        device = torch.device(context.device)
        self._link = new_link(context, device)
        wanted = [wanted_from_json(told) for told in self._gather("routes", wanted_by(rollout, offer.weights))]
        self._bucket_bytes = config.bucket_bytes or default_bucket_bytes(device.type)
        try:
            self.pieces = PieceSync(offer, wanted, nodes, context.rank, self._bucket_bytes, self._link, device)
        except Untraceable as error:
            self.fallback = str(error)
            if context.rank == 0:
                _log.warning("weight syncs send whole tensors, since %s", error)
        self._last: dict[str, int] | None = None
        self._role, self._memory = context.role, arbiter_of(context)
        self._memory.add_generation(f"{self._role}.rollout", rollout, sleeps=config.sleeps)
        self._memory.add_sync(
            f"{self._role}.sync",
            {self._role: "parameters", f"{self._role}.rollout": "weights"},
            overwrites=self.pieces is None or self.pieces.overwrites,
            buckets=self.pieces.buffer_bytes if self.pieces is not None else 2 * self._bucket_bytes,
        )

    def run(self, must_change: bool) -> SyncReport:
        """Move the trainer's weights to the generation engine, verified.

        must_change: a step was made since the last sync, so some weight has to differ. Raises RuntimeErrors that say
        what is wrong and where; the generation engine then refuses to generate until a sync succeeds.
        """
        self._memory.turn(f"{self._role}.sync")
        report = self._whole_tensors(must_change) if self.pieces is None else self._pieces(self.pieces, must_change)
        if self._config.canary_tolerance:
            self._memory.turn(f"{self._role}.generate")
            send_canary(self._engine, self._rollout, self._config, lambda value: self._gather("canary", value))
        return report

    @property
    def dropped(self) -> bool:
        """Whether the generation engine gave its weights up for a sync that was to come: it needs one now."""
        return self._memory.has_dropped(f"{self._role}.rollout", "weights")

    def _gather(self, phase: str, value: Any) -> list[Any]:
        """Every rank's value, by rank, outside of a sync."""
        if self._link is None:
            return [json.loads(json.dumps(value))]
        self._link.meet()
        with self._link.kept_while(phase):
            return self._link.gather_json(value)

    def _pieces(self, pieces: PieceSync, must_change: bool) -> SyncReport:
        reports: list[SyncReport] = []

        def sync(target: Shards, prepare: Any, finish: Any) -> int:
            if self._link is not None:
                self._link.meet()
            version = self._engine.version
            reports.append(pieces.run(version, self._engine, target, prepare, finish, must_change))
            return version

        self._rollout.receive_shards(sync)
        return reports[0]

    def _whole_tensors(self, must_change: bool) -> SyncReport:
        started = time.perf_counter()
        dtype = getattr(torch, self._config.dtype)
        self._rollout.refuse("the last weight sync did not complete")
        expected = self._engine.checksums(dtype)
        if must_change:
            check_changed(self._engine.version, self._last, expected)
        buckets = self._engine.full_weights(dtype, self._bucket_bytes)
        report = self._rollout.receive_weights(self._engine.version, buckets, expected)
        self._last = expected
        return SyncReport(self._engine.version, report.parameters, report.bytes, time.perf_counter() - started)


def new_link(context: WorkerContext, device: torch.device) -> Link | None:
    """A link between the ranks of this pool; None for one alone. Collective."""
    if context.world == 1:
        return None
    # A name of its own each time: the store still knows the addresses of every link before.
    name = [uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    store = dist.distributed_c10d._get_default_store()
    return Link(store, name[0], context.rank, context.world, device, context.sync_timeout_s)
