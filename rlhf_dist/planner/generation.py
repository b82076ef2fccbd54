"""Seconds of generation: prefill, then decode steps bound by memory traffic, while the batch shrinks.

    rows of a replica   waiting ----> running, at most as many as keys and values fit ----> finished
    a decode step       max(read weights, compute) + read keys and values + tp all-reduces + host work
    the last wave       fewer rows run with every response that finishes: steps get cheaper, none is skipped

Keys and values of all running rows share the memory that weights and other roles leave. Prompts are prefilled
once for all samples of a prompt (prefix caching).
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, log

from rlhf_dist.model_specs import ModelSpec
from rlhf_dist.planner.cost import NodeCost, cost_of
from rlhf_dist.planner.memory import WEIGHT_BYTES, generation_weights, kv_bytes_per_token
from rlhf_dist.planner.rates import Machine
from rlhf_dist.planner.strategy import Generation
from rlhf_dist.planner.work import NodeWork
from rlhf_dist.planner.workload import Workload


def generation_cost(
    model: ModelSpec, work: NodeWork, load: Workload, generation: Generation, machine: Machine, budget: float
) -> NodeCost | None:
    """A node that generates, given `budget` bytes per GPU beside what is at rest; None if no row fits.

    CUDA graphs are at rest: an engine that sleeps gives back weights and cache, and keeps them.
    """
    weights = generation_weights(model, generation)
    cache = budget - weights
    token_bytes = kv_bytes_per_token(model, generation)
    room = cache / token_bytes  # tokens
    if room < load.longest:
        return None
    rows = ceil(work.rows / generation.replicas)
    response = load.response
    # A row that has been running for a while holds, on average, E[L^2] / 2 E[L] response tokens.
    usual = load.prompt.mean + response.mean_square / (2.0 * response.mean)
    most = min(float(rows), max(1.0, room / usual))
    admitted = _admitted(model, rows, most)
    decodes = [_decode(model, work, load, generation, machine, running) for running in admitted]
    running, decode = min(zip(admitted, decodes, strict=True), key=lambda way: sum(way[1].values()))
    prefill = _prefill_s(model, work, load, generation, machine, rows)
    parts = {"prefill": prefill, **decode, "call": machine.efficiency.call_s}
    peak = min(cache, token_bytes * running * (load.prompt.mean + response.longest))
    memory = {"weights": weights, "kv_cache": peak}
    note = f"{running:.0f} of {rows} rows at a time" if running < rows else f"{rows} rows at a time"
    return cost_of(parts, memory, machine.efficiency.generate_scale, text=note)


def _admitted(model: ModelSpec, rows: int, most: float) -> list[float]:
    """Rows at a time to consider where `most` fit.

    More are never slower for a dense model. Of a mixture they may be: a long tail of few rows reads few experts. Then
    an engine does better to admit fewer; in steps that do not depend on `most`, so that more memory is never slower.
    """
    if not model.experts:
        return [most]
    grid = [min(float(rows), 1.25**power) for power in range(ceil(log(max(rows, 1)) / log(1.25)) + 1)]
    return [running for running in grid if running <= most]


def generation_floor_s(model: ModelSpec, work: NodeWork, load: Workload, gpus: int, machine: Machine) -> float:
    """Seconds that generation takes at least on `gpus` GPUs or fewer.

    Keys and values are read over all of them, prompts computed over all of them; a decode step reads a share of
    the weights, the smaller the more GPUs share a replica, and costs host time for every row, the less the fewer.
    """
    response, use, gpu = load.response, machine.efficiency, machine.cluster.gpu
    longest = response.expected_longest(work.rows)
    contexts = response.mean * load.prompt.mean + response.mean_square / 2.0
    kv = work.rows * contexts * model.kv_bytes_per_token() / (gpu.hbm_bytes_per_s * use.hbm_kv * gpus)
    tokens = work.prompts * load.prompt.mean
    prefill = model.forward_flops(tokens, work.prompts * load.prompt.mean_square) / gpus / machine.flops
    read = WEIGHT_BYTES * model.decode_weights(1.0) / (gpu.hbm_bytes_per_s * use.hbm_weights)
    steps = []
    for ranks in (1, 2, 4, 8, 16, 32, 64, 128):
        rows = work.rows * ranks / gpus
        host = longest * (use.decode_step_s + model.layers * use.decode_layer_s)
        steps.append(longest * read / ranks + host + rows * response.mean * use.decode_sequence_s)
    return use.generate_scale * (kv + prefill + min(steps))


def least_cache_bytes(model: ModelSpec, load: Workload, generation: Generation) -> float:
    """Keys and values of the longest row, bytes per GPU: less is no use."""
    return kv_bytes_per_token(model, generation) * load.longest


@lru_cache(maxsize=100_000)
def _decode(
    model: ModelSpec, work: NodeWork, load: Workload, generation: Generation, machine: Machine, running: float
) -> dict[str, float]:
    """Seconds by cause of all decode steps of the replica that has the longest row."""
    response, prompt = load.response, load.prompt.mean
    total = dict.fromkeys(("weights", "kv", "compute", "kernels", "tp", "host"), 0.0)

    def add(steps: float, batch: float, context: float) -> None:
        for name, seconds in _step(model, generation, machine, batch, context).items():
            total[name] += steps * seconds

    waiting = ceil(work.rows / generation.replicas) - running
    if waiting > 0:  # Rows that finish make room for others: the batch stays full.
        usual = response.mean_square / (2.0 * response.mean)
        add(waiting * response.mean / running, running, prompt + usual)
    for behind, steps, alive in response.alive(work.rows):
        add(steps, max(1.0, running * alive), prompt + behind)
    return total


def _step(model: ModelSpec, generation: Generation, machine: Machine, batch: float, context: float) -> dict[str, float]:
    """Seconds by cause of one token for each of `batch` rows with `context` tokens behind them."""
    gpu, use = machine.cluster.gpu, machine.efficiency
    # Stages of a pipeline take turns on a batch cut into pp parts: each reads its weights once for each part.
    parts = generation.pp
    weights = WEIGHT_BYTES * model.decode_weights(batch / parts) / generation.tp
    read = weights / (gpu.hbm_bytes_per_s * use.hbm_weights)
    flops = 2.0 * model.active * (batch / parts) / generation.tp
    compute = flops / machine.flops
    kv = kv_bytes_per_token(model, generation) * batch * context / (gpu.hbm_bytes_per_s * use.hbm_kv)
    tp = 0.0
    if generation.tp > 1:
        volume = 2.0 * (batch / parts) * model.hidden
        tp = model.layers * 2.0 * machine.fabric.all_reduce_s(volume, generation.tp)
    return {
        "weights": read,
        "compute": max(0.0, compute - read),
        "kv": kv * parts / generation.pp,
        "kernels": model.layers * use.decode_layer_s,
        "tp": tp,
        "host": use.decode_step_s * parts + use.decode_sequence_s * batch,
    }


def _prefill_s(
    model: ModelSpec, work: NodeWork, load: Workload, generation: Generation, machine: Machine, rows: int
) -> float:
    shared = max(1.0, work.rows / max(work.prompts, 1))
    prompts = ceil(rows / shared)
    tokens, squares = prompts * load.prompt.mean, prompts * load.prompt.mean_square
    compute = machine.forward_s(model, tokens, squares, generation.tp * generation.pp, tokens)
    tp = 0.0
    if generation.tp > 1:
        passes = max(1.0, tokens / 8192.0)  # vLLM's chunked prefill (max_num_batched_tokens)
        volume = 2.0 * tokens / passes * model.hidden
        tp = passes * model.layers / generation.pp * 2.0 * machine.fabric.all_reduce_s(volume, generation.tp)
    return compute + tp
