"""`make bench-reshard`: 135M random parameters from 4 training ranks to TP=2 x DP=2 bf16 generation weights.

Each of three ways, from FSDP2 and from real DeepSpeed ZeRO-3, on 4 gloo processes, all in one run:

    ours             the routes' pieces, checksummed on both sides (its time is `seconds`; `seconds_unverified` without)
    full_gather      every parameter whole on every rank, cast to bf16 before gathering, then sliced
    rank0_broadcast  whole on rank 0, which broadcasts it; then sliced

Medians over the rounds, the slowest rank counting. `bytes_received_per_rank` counts payload.
`peak_extra_bytes_per_rank` is the most that is allocated at one time beside what was there before (the training
shards and the target weights), by torch's own record of every allocation, in a round of its own. `llama_70b` is
the time of planning at 512 ranks (under 10 s is the aim).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_dist.reshard.groups import Cut, Parallel, generation_grid, parallel_layout, rollout_axes, rollout_grid
from rlhf_dist.reshard.layout import Layout, ParameterLayout
from rlhf_dist.reshard.rounds import rounds_of
from rlhf_dist.reshard.routes import lower_bound_bytes, make_routes
from rlhf_dist.reshard.shards import Shards, dtensor_layout, dtensor_shards, flat_shards
from tests.engines.world import World
from tests.reshard.models import LLAMA_70B, llama
from workers.reshard.exchange import exchange
from workers.reshard.link import Link
from workers.reshard.sync import WeightSync

WORLD, TP = 4, 2
BUCKET_BYTES = 32 << 20
# 30 layers, hidden 576, feed-forward 1536 as SmolLM2-135M, with 8 heads of 72 in place of 9, so that TP=2 divides them.
SHAPE = dict(layers=30, hidden=576, intermediate=1536, heads=8, kv_heads=4, vocabulary=49152, tied=True)
CUTS: dict[str, Cut] = llama(**SHAPE)  # type: ignore[arg-type]
ROUNDS = 7


class Parameters(nn.Module):
    """The parameters alone, one module each layer, so that FSDP2 and ZeRO-3 cut them as they cut a model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.names: dict[str, str] = {}
        for name, cut in CUTS.items():
            key = name.replace(".", "_")
            self.names[key] = name
            self.register_parameter(key, nn.Parameter(torch.randn(cut.shape) * 0.02))


_kept: dict[str, Any] = {}


def setup(kind: str, shares: bool) -> dict[str, int]:
    """Builds the training side on this rank."""
    model = Parameters()
    whole = {name: getattr(model, key).detach().bfloat16() for key, name in model.names.items()}
    if kind == "fsdp4_to_tp2dp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        grid = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("shard",))
        fully_shard(model, mesh=grid)
        sharded = {model.names[key]: p for key, p in model.named_parameters()}
        layout, shards = dtensor_layout(sharded, grid), dtensor_shards(sharded)  # type: ignore[arg-type]
        _kept["whole"] = lambda name: _full_dtensor(sharded[name])  # type: ignore[arg-type]
    else:
        layout, shards, gather = _zero3(model)
        _kept["whole"] = gather
    grid = rollout_grid(rollout_axes(WORLD, TP))
    target = parallel_layout(CUTS, grid[:, None, :], "bfloat16")
    routes = make_routes(layout.as_dtype("bfloat16"), target)
    rank = dist.get_rank()
    wanted = {name: [whole[name][_slices(box)] for box in p.boxes_of(rank)] for name, p in target.parameters.items()}
    store, cpu = dist.distributed_c10d._get_default_store(), torch.device("cpu")
    link = Link(store, kind, rank, WORLD, cpu, 60.0, shares=shares)
    _kept.update({"routes": routes, "shards": shards, "target": target, "wanted": wanted, "model": model, "link": link})
    _kept["sync"] = WeightSync(routes, rank, BUCKET_BYTES, link)
    bound = lower_bound_bytes(routes.source, target)
    return {
        "lower_bound": int(bound[rank]),
        "planned": int(routes.moved[rank]),
        "target": int(target.bytes_per_rank()[rank]),
        "buffers": rounds_of(routes, rank, BUCKET_BYTES).buffer_bytes,
        "parameters": sum(int(np.prod(cut.shape)) for cut in CUTS.values()),
        "least_bound": _least_bound(routes.source),
    }


def _zero3(model: Parameters) -> tuple[Layout, Shards, Callable[[str], Tensor]]:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank())}
    os.environ |= {"WORLD_SIZE": str(WORLD), "LOCAL_SIZE": str(WORLD)}
    import deepspeed

    # As the engine does: its all-reduce over shared memory would be compiled first, and leave 64 MiB a rank there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    _kept["engine"] = engine
    named = {model.names[key]: p for key, p in model.named_parameters()}
    rank, parameters, shards = dist.get_rank(), {}, {}
    for name, p in named.items():
        size = p.ds_tensor.ds_numel if hasattr(p.ds_tensor, "ds_numel") else p.ds_tensor.numel()
        ranges = [(r, r * size, (r + 1) * size) for r in range(WORLD)]
        parameters[name] = ParameterLayout.from_flat_ranges(tuple(p.ds_shape), "float32", ranges)
        shards[name] = flat_shards(p.ds_tensor.detach().view(-1), tuple(p.ds_shape), *ranges[rank][1:])

    def gather(name: str) -> Tensor:
        # Cast first, as for FSDP: DeepSpeed's own gathering moves float32.
        flat = named[name].ds_tensor.detach().view(-1).bfloat16()
        whole = flat.new_empty(WORLD * len(flat))
        dist.all_gather_into_tensor(whole, flat)
        _kept["received"] += (WORLD - 1) * flat.nbytes
        return whole[: int(np.prod(CUTS[name].shape))].view(CUTS[name].shape)

    return Layout(WORLD, parameters), shards, gather


def _full_dtensor(parameter: DTensor) -> Tensor:
    cast = parameter.detach().bfloat16()
    _kept["received"] += (WORLD - 1) * -(-parameter.shape[0] // WORLD) * parameter.shape[1:].numel() * 2
    whole: Tensor = cast.full_tensor()
    return whole


def _least_bound(source: Layout) -> int:
    """Bytes over all ranks under the best of all groupings."""
    from itertools import permutations

    orders = [np.array(order).reshape(-1, 1, TP) for order in permutations(range(WORLD))]
    return min(int(lower_bound_bytes(source, parallel_layout(CUTS, g, "bfloat16")).sum()) for g in orders)


def _slices(box: Any) -> tuple[slice, ...]:
    return tuple(slice(*edge) for edge in box)


# --- the three ways ----------------------------------------------------------------------------------
def ours(verified: bool = True) -> None:
    sync: WeightSync = _kept["sync"]
    if verified:
        _kept["link"].meet()
        report = sync.run(_kept["version"], _kept["shards"], _kept["into"])
        _kept["received"] += report.bytes_received
        _kept["phases"] = report.phase_seconds
    else:
        _kept["link"].meet()
        _kept["received"] += exchange(
            rounds_of(sync.routes, sync.rank, BUCKET_BYTES), _kept["shards"], _kept["into"], _kept["link"]
        )


def ours_unverified() -> None:
    ours(verified=False)


def full_gather() -> None:
    for name in CUTS:
        _slice_into(name, _kept["whole"](name))


def rank0_broadcast() -> None:
    first = dist.get_rank() == 0
    for name, cut in CUTS.items():
        mine = torch.cat([shard.reshape(-1).bfloat16() for shard in _kept["shards"][name]])
        whole = torch.empty(cut.shape, dtype=torch.bfloat16)
        # Every shape here is a multiple of the ranks, so the parts are equal and in order.
        dist.gather(mine, list(whole.view(-1).split(len(mine))) if first else None, dst=0)
        dist.broadcast(whole, 0)
        _kept["received"] += whole.nbytes - mine.nbytes if first else whole.nbytes
        _slice_into(name, whole)


def _slice_into(name: str, whole: Tensor) -> None:
    boxes = _kept["target"].parameters[name].boxes_of(dist.get_rank())
    for box, into in zip(boxes, _kept["into"][name], strict=True):
        into.copy_(whole[_slices(box)])


WAYS = {
    "ours": ours,
    "full_gather": full_gather,
    "rank0_broadcast": rank0_broadcast,
    "ours_unverified": ours_unverified,
}


def measure(way: str, version: int, memory: bool) -> dict[str, Any]:
    """One sync into fresh weights: seconds, bytes, and (in a run of its own, since watching costs time) memory."""
    _kept["into"] = {name: [torch.zeros_like(t) for t in parts] for name, parts in _kept["wanted"].items()}
    _kept.update(received=0, version=version, phases={})
    dist.barrier()
    started = time.perf_counter()
    peak = _peak_of(WAYS[way]) if memory else WAYS[way]()
    dist.barrier()
    seconds = time.perf_counter() - started
    for name, parts in _kept["wanted"].items():
        assert all(torch.equal(a, b) for a, b in zip(parts, _kept["into"][name], strict=True)), name
    return {"seconds": seconds, "received": _kept["received"], "peak": peak, "phases": dict(_kept["phases"])}


def _peak_of(call: Callable[[], None]) -> int:
    """Most bytes allocated at one time by torch inside `call`, from the profiler's record of every allocation."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            call()
        file = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    moves = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = np.cumsum([size for _, size in moves])
    return int(held.max(initial=0))


def _layout_results(world: World, kind: str, shares: bool) -> dict[str, Any]:
    facts = world.run(setup, kind, shares)
    found: dict[str, Any] = {"lower_bound_bytes_per_rank": [fact["lower_bound"] for fact in facts]}
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for k in range(ROUNDS + 1):
        for way in WAYS:
            answers = world.run(measure, way, k, False)
            if k:  # the first warms up
                slowest = max(answers, key=lambda answer: answer["seconds"])
                rounds[way].append({"seconds": slowest["seconds"], "phases": slowest["phases"]})
                received = [answer["received"] for answer in answers]
                found.setdefault(way, {})["bytes_received_per_rank"] = received
    for way, results in rounds.items():
        times = [result["seconds"] for result in results]
        watched = world.run(measure, way, ROUNDS + 1, True)
        found[way] |= {
            "seconds": round(statistics.median(times), 4),
            "seconds_all": [round(t, 4) for t in times],
            "peak_extra_bytes_per_rank": [answer["peak"] for answer in watched],
        }
    phases = [result["phases"] for result in rounds["ours"]]
    found["ours"]["phase_seconds"] = {k: round(statistics.median(p[k] for p in phases), 4) for k in phases[0]}
    found["ours"]["seconds_unverified"] = found.pop("ours_unverified")["seconds"]
    bound = sum(found["lower_bound_bytes_per_rank"])
    found["target_bytes_per_rank"] = [fact["target"] for fact in facts]
    found["ours"]["planned_buffer_bytes_per_rank"] = [fact["buffers"] for fact in facts]
    found["checks"] = {
        "bytes_over_bound": round(sum(found["ours"]["bytes_received_per_rank"]) / bound - 1, 6),
        "time_share_of_full_gather": round(found["ours"]["seconds"] / found["full_gather"]["seconds"], 3),
        "best_grouping": bound == facts[0]["least_bound"],
        "peak_within_bucket_and_target": all(
            peak <= BUCKET_BYTES + fact["target"]
            for peak, fact in zip(found["ours"]["peak_extra_bytes_per_rank"], facts, strict=True)
        ),
    }
    return found | {"parameters": facts[0]["parameters"]}


def planning_seconds() -> dict[str, float]:
    """CPU seconds of planning a Llama-70B from FSDP2 over 512 ranks to 64 copies at TP=8; of one rank's own pieces."""
    parameters = llama(*LLAMA_70B)
    fsdp = {n: ParameterLayout.from_mesh(c.shape, "bfloat16", np.arange(512), [0]) for n, c in parameters.items()}
    target = parallel_layout(parameters, generation_grid(Parallel(8, 8, 8, 1, 8), "vanilla"), "bfloat16")
    started = time.process_time()
    routes = make_routes(Layout(512, fsdp), target, (np.arange(512) // 8).tolist())
    planned = time.process_time()
    rounds_of(routes, 100, 1 << 30)
    return {"plan_s": round(planned - started, 2), "own_pieces_s": round(time.process_time() - planned, 2)}


def main() -> None:
    """Run both layouts and print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="*", default=["fsdp4_to_tp2dp2", "zero3x4_to_tp2dp2"])
    parser.add_argument("--shares", action="store_true", help="chunks in memory that all processes see, not sent")
    given, layouts = parser.parse_args(), {}
    for kind in given.layouts:
        world = World(WORLD)
        try:
            layouts[kind] = _layout_results(world, kind, given.shares)
        finally:
            world.close()
    planning = planning_seconds()
    print(json.dumps({"benchmark": "reshard", "bucket_bytes": BUCKET_BYTES, "layouts": layouts, "llama_70b": planning}))


if __name__ == "__main__":
    main()
