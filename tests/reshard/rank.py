"""What the tests run inside a rank of a gloo world."""

from __future__ import annotations

import os
import random
import signal
import time
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_dist.reshard.layout import Layout
from rlhf_dist.reshard.routes import make_routes
from tests.reshard import strict
from tests.reshard.random_layouts import random_pair
from workers.reshard.link import Link, SyncStopped
from workers.reshard.sync import SyncFailed, WeightSync
from workers.reshard.watch import SILENCE_S

BUCKET = 1 << 20

_links: dict[str, Link] = {}
_syncs: dict[str, WeightSync] = {}


def link(name: str, timeout_s: float = 20.0, silence_s: float = SILENCE_S) -> Link:
    """The link of that name over this world's store, made on first use; it may open its connections now.

    `...shared...`: buffers that all ranks see; `strict...`: NCCL's rules; `cuda...`: all ranks on one GPU.
    """
    strict.use(name.startswith("strict"))
    if name not in _links:
        store = dist.distributed_c10d._get_default_store()
        rank, world, shares = dist.get_rank(), dist.get_world_size(), "shared" in name
        _links[name] = Link(store, name, rank, world, device_of(name), timeout_s, shares=shares, silence_s=silence_s)
    return _links[name]


def device_of(name: str) -> torch.device:
    return torch.device("cuda:0" if name.startswith("cuda") else "cpu")


def moved(shards: dict[str, list[Tensor]], name: str) -> dict[str, list[Tensor]]:
    """The shards on the device of that link."""
    return {parameter: [shard.to(device_of(name)) for shard in held] for parameter, held in shards.items()}


def whole(layout: Layout, version: int) -> dict[str, Tensor]:
    """Every parameter of a version, float32, no two elements alike."""
    made, at = {}, 1.0 + version
    for name, p in layout.parameters.items():
        made[name] = (torch.arange(prod(p.shape)) % 61 + at).reshape(p.shape)
        at += 0.125
    return made


def shards_of(full: dict[str, Tensor], layout: Layout, rank: int) -> dict[str, list[Tensor]]:
    return {
        name: [full[name][tuple(slice(*edge) for edge in box)].clone() for box in p.boxes_of(rank)]
        for name, p in layout.parameters.items()
    }


def blank(layout: Layout, rank: int) -> dict[str, list[Tensor]]:
    """Target shards full of NaN; every other one a transposed view, as GPT-2's are."""
    made: dict[str, list[Tensor]] = {}
    for name, p in layout.parameters.items():
        made[name] = []
        for k, box in enumerate(p.boxes_of(rank)):
            sizes = [stop - start for start, stop in box]
            dtype = getattr(torch, p.dtype)
            shard = torch.full(sizes[::-1] if k % 2 == 0 else sizes, torch.nan, dtype=dtype)
            made[name].append(shard.permute(tuple(range(len(sizes)))[::-1]) if k % 2 == 0 else shard)
    return made


def round_trips(first: int, count: int, name: str = "trips", world: int = 4) -> list[str]:
    """Train layout -> generation layout -> back, compared element for element; returns what went wrong."""
    wrong, rank = [], dist.get_rank()
    for seed in range(first, first + count):
        source, target = random_pair(random.Random(seed), world)
        full = whole(target, seed % 7)
        wanted = {n: t.to(getattr(torch, target.parameters[n].dtype)) for n, t in full.items()}
        there, met = make_routes(source, target), link(name)
        met.meet()
        middle = moved(blank(target, rank), name)
        WeightSync(there, rank, BUCKET, met).run(seed, moved(shards_of(full, source, rank), name), middle)
        back = make_routes(target, source)
        end = moved(blank(source, rank), name)
        report = WeightSync(back, rank, BUCKET, met).run(seed, middle, end)
        for held, layout in ((middle, target), (end, source)):
            for parameter, pieces in shards_of(wanted, layout, rank).items():
                if not all(torch.equal(a, b.cpu()) for a, b in zip(pieces, held[parameter], strict=True)):
                    wrong.append(f"seed {seed} {parameter}")
        if report.bytes_received != back.moved[rank]:
            wrong.append(f"seed {seed}: received {report.bytes_received}, planned {back.moved[rank]}")
    return wrong


def one_sync(
    name: str,
    version: int,
    *,
    fault: str = "",
    at: int = -1,
    timeout_s: float = 20.0,
    silence_s: float = SILENCE_S,
) -> dict[str, Any]:
    """FSDP over all ranks to tensor parallel over ranks 0-1 and 2-3, with a fault on rank `at`."""
    import numpy as np

    from rlhf_dist.reshard.groups import Cut, parallel_layout, rollout_axes, rollout_grid
    from rlhf_dist.reshard.layout import ParameterLayout

    rank, faulty = dist.get_rank(), dist.get_rank() == at
    cuts = {"layers.0.q_proj": Cut((512, 256), 0), "layers.0.o_proj": Cut((256, 512), 1), "norm": Cut((256,), None)}
    target = parallel_layout(cuts, rollout_grid(rollout_axes(4, 2))[:, None, :], "bfloat16")
    source = Layout(4, {n: ParameterLayout.from_mesh(c.shape, "bfloat16", np.arange(4), [0]) for n, c in cuts.items()})
    if name not in _syncs:
        _syncs[name] = WeightSync(make_routes(source, target), rank, BUCKET, link(name, timeout_s, silence_s))
    sync = _syncs[name]
    full = whole(target, version)
    mine, theirs = shards_of(full, source, rank), blank(target, rank)
    if faulty and fault == "stall before":
        time.sleep(timeout_s + 2)
    if faulty and fault == "other version":
        version += 1

    def prepare() -> None:
        if faulty and fault == "stall inside":
            time.sleep(timeout_s + 2)
        if faulty and fault == "error inside":
            raise OSError("no memory left")
        if faulty and fault == "die inside":
            os._exit(9)
        if faulty and fault == "stop inside":
            os.kill(os.getpid(), signal.SIGSTOP)

    def finish(agreed: int) -> None:
        if faulty and fault == "corrupt":
            theirs["layers.0.q_proj"][0][3, 4] += 1
        if faulty and fault == "swap":
            q = theirs["layers.0.q_proj"][0]
            q[[3, 4]] = q[[4, 3]]

    started = time.perf_counter()
    try:
        link(name).meet()
        report = sync.run(version, mine, theirs, prepare=prepare, finish=finish, must_change=fault == "trained nothing")
    except (SyncFailed, SyncStopped) as error:
        return {"error": type(error).__name__, "says": str(error), "seconds": time.perf_counter() - started}
    wanted = shards_of({n: t.bfloat16() for n, t in full.items()}, target, rank)
    equal = all(torch.equal(a, b) for n in wanted for a, b in zip(wanted[n], theirs[n], strict=True))
    return {"equal": equal, "received": report.bytes_received, "planned": int(sync.routes.moved[rank])}
