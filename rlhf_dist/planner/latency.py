"""Seconds of training and inference: compute-bound passes, and the communication that does not hide behind them.

    one update = m micro-batches x (forward + backward) with what ZeRO moves hidden behind them as far as it goes
      ZeRO-1   parameters gathered once, behind the first forward; gradients scattered once, behind the last backward
      ZeRO-2   as 1, but gradients are scattered in every micro-batch
      ZeRO-3   parameters gathered for every forward and again for every backward, gradients scattered each time
    tensor-parallel and Ulysses collectives stand between matmuls and hide behind nothing

Compute is FLOPs / (peak x efficiency). Backward is twice forward; recomputing adds one forward. A pipeline of
p stages adds p - 1 slots to m (1F1B, Narayanan et al. 2021), and its slowest stage sets the pace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

from rlhf_dist.planner.collectives import Fabric
from rlhf_dist.planner.efficiency import Efficiency
from rlhf_dist.planner.hardware import Cluster
from rlhf_dist.planner.memory import (
    GRADIENT_BYTES,
    OPTIMIZER_BYTES,
    REDUCED_BYTES,
    WEIGHT_BYTES,
    activation_bytes_per_token,
    gathered_bytes,
    gradient_bytes,
    logit_bytes,
)
from rlhf_dist.planner.models import ModelSpec
from rlhf_dist.planner.strategy import Strategy
from rlhf_dist.planner.work import NodeWork
from rlhf_dist.planner.workload import Workload

INFERENCE_MICRO_TOKENS = 32768.0
"""Most tokens of a forward pass without backward: more gives the matrix units nothing."""


@dataclass(frozen=True)
class NodeCost:
    """What a node costs under a strategy."""

    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    """Where the seconds go: compute, communication, offload, ..."""
    memory: dict[str, float] = field(default_factory=dict)
    """Tensor class -> bytes per GPU needed while it runs, beside what roles hold at rest."""
    note: str = ""
    """How it runs: micro-batches, recomputation."""
    layout: Strategy | None = None
    """The layout it runs under, where that is not the one its role is held in."""


def scaled(parts: dict[str, float], scale: float) -> dict[str, float]:
    """Seconds as measured runs say they are (`Efficiency.*_scale`)."""
    return parts if scale == 1.0 else {name: seconds * scale for name, seconds in parts.items()}


@dataclass(frozen=True)
class Machine:
    """A cluster with its efficiencies applied."""

    cluster: Cluster
    efficiency: Efficiency
    fabric: Fabric
    flops: float
    """Of one GPU in large matmuls."""

    @classmethod
    def of(cls, cluster: Cluster, efficiency: Efficiency) -> Machine:
        """This cluster with these efficiencies."""
        share = efficiency.matmul or cluster.gpu.matmul_efficiency
        return cls(cluster, efficiency, Fabric.of(cluster, efficiency), cluster.gpu.flops * share)

    def compute_s(self, flops: float, pass_tokens: float) -> float:
        """FLOPs of one GPU in passes of `pass_tokens` tokens."""
        return flops / self.flops * (1.0 + self.efficiency.matmul_half_tokens / max(pass_tokens, 1.0))


Variants = tuple[tuple[float, NodeCost], ...]
"""(bytes per GPU it needs beside what is at rest, cost), more memory and less time with every entry."""


def cheapest(variants: Variants, budget: float) -> NodeCost | None:
    """The fastest way to run a node in `budget` bytes per GPU; None if there is none."""
    found: NodeCost | None = None
    for need, cost in variants:
        if need > budget:
            break
        found = cost
    return found


def staircase(ways: list[tuple[float, NodeCost]]) -> Variants:
    """Ways to run a node without those that need more memory and no less time."""
    kept: list[tuple[float, NodeCost]] = []
    for need, cost in sorted(ways, key=lambda way: (way[0], way[1].seconds)):
        if not kept or cost.seconds < kept[-1][1].seconds:
            kept.append((need, cost))
    return tuple(kept)


def training_variants(
    model: ModelSpec,
    work: NodeWork,
    load: Workload,
    strategy: Strategy,
    machine: Machine,
    *,
    recompute: bool | None = None,
) -> Variants:
    """Ways to run a node that trains: activations kept or recomputed (None: either), in more or fewer micro-batches."""
    rows = ceil(work.rows / work.mini_batches / strategy.dp)
    ways = []
    for again in (False, True) if recompute is None else (recompute,):
        for micros in _cuts(rows) if strategy.pp == 1 else (rows,):
            cost = _training(model, work, load, strategy, machine, rows / micros, micros, again)
            ways.append((sum(cost.memory.values()), cost))
    return staircase(ways)


def _cuts(rows: int) -> list[int]:
    """Numbers of micro-batches to consider: one, two, four, ..., a row each."""
    cuts = [1]
    while cuts[-1] * 2 < rows:
        cuts.append(cuts[-1] * 2)
    return [*cuts, rows] if rows > 1 else cuts


def _training(
    model: ModelSpec,
    work: NodeWork,
    load: Workload,
    strategy: Strategy,
    machine: Machine,
    micro_rows: float,
    micros: int,
    recompute: bool,
) -> NodeCost:
    tp, sp, pp, fabric = strategy.tp, strategy.sp, strategy.pp, machine.fabric
    tokens, squares = micro_rows * load.row_tokens, micro_rows * load.row_squares
    forward = machine.compute_s(model.forward_flops(tokens, squares) / (tp * sp * pp), tokens / sp)
    forward *= _slowest_stage(model, pp)
    passes = 4.0 if recompute else 3.0
    block = _block_s(model, tokens, strategy, fabric)
    hops = 2.0 * _stage_transfer_s(model, tokens, strategy, machine)
    front, back = forward + block, (passes - 1.0) * (forward + block)

    own = model.parameters / (tp * pp)
    ranks = strategy.dp * sp
    gather = fabric.gather_s(WEIGHT_BYTES * own, ranks, tp)
    scatter = fabric.gather_s(REDUCED_BYTES[strategy.zero] * own, ranks, tp)
    hide = machine.efficiency.overlap
    if strategy.zero == 3:
        exposed = micros * (max(0.0, gather - hide * front) + max(0.0, gather + scatter - hide * back))
    elif strategy.zero == 2:
        exposed = max(0.0, gather - hide * front) + micros * max(0.0, scatter - hide * back)
    else:
        exposed = max(0.0, gather - hide * front) + max(0.0, scatter - hide * back)

    updates = work.mini_batches * work.epochs
    slots = micros + pp - 1
    parts = {
        "compute": updates * micros * passes * forward,
        "tp/sp": updates * micros * passes * block,
        "pipeline": updates * ((slots - micros) * passes * (forward + block) + slots * hops),
        "zero": updates * exposed,
        "optimizer": updates * _optimizer_s(model, strategy, machine),
        "call": machine.efficiency.call_s,
    }
    parts = scaled(parts, machine.efficiency.train_scale)
    kept, at_work = activation_bytes_per_token(model, strategy, recompute=recompute)
    # Rows are balanced by tokens, but the longest one must fit by itself.
    most = max(tokens, load.prompt.longest + load.response.longest)
    memory = {
        "gradients": gradient_bytes(model, strategy),
        "activations": (kept + at_work) * most,
        "logits": logit_bytes(model, strategy),
        "gathered": gathered_bytes(model, strategy),
    }
    note = f"{micros} micro-batch{'es' if micros > 1 else ''} of {micro_rows:.3g} rows"
    return NodeCost(sum(parts.values()), parts, memory, note + (", recompute" if recompute else ""))


def inference_variants(
    model: ModelSpec, work: NodeWork, load: Workload, strategy: Strategy, machine: Machine, *, trained: bool
) -> Variants:
    """Ways to run a forward pass over the rows: fewer, larger passes need more memory."""
    rows = ceil(work.rows / strategy.dp)
    least = min(rows, max(1, ceil(rows * load.row_tokens / INFERENCE_MICRO_TOKENS)))
    if strategy.pp > 1:
        least = min(rows, max(least, 4 * strategy.pp))
    ways = []
    for micros in (cut for cut in sorted({least, *_cuts(rows)}) if cut >= least):
        cost = _inference(model, load, strategy, machine, rows / micros, micros, trained)
        ways.append((sum(cost.memory.values()), cost))
    return staircase(ways)


def _inference(
    model: ModelSpec,
    load: Workload,
    strategy: Strategy,
    machine: Machine,
    micro_rows: float,
    micros: int,
    trained: bool,
) -> NodeCost:
    tp, sp, pp, fabric = strategy.tp, strategy.sp, strategy.pp, machine.fabric
    tokens, squares = micro_rows * load.row_tokens, micro_rows * load.row_squares
    forward = machine.compute_s(model.forward_flops(tokens, squares) / (tp * sp * pp), tokens / sp)
    forward *= _slowest_stage(model, pp)
    block = _block_s(model, tokens, strategy, fabric)
    hops = _stage_transfer_s(model, tokens, strategy, machine)
    exposed = 0.0
    if strategy.zero == 3:
        gather = fabric.gather_s(WEIGHT_BYTES * model.parameters / (tp * pp), strategy.dp * sp, tp)
        exposed = micros * max(0.0, gather - machine.efficiency.overlap * (forward + block))
    _, at_work = activation_bytes_per_token(model, strategy, recompute=True)
    most = max(tokens, load.prompt.longest + load.response.longest)
    memory = {
        "activations": at_work * most,
        "logits": logit_bytes(model, strategy),
        "gathered": gathered_bytes(model, strategy),
    }
    onload = 0.0
    if strategy.offload and not trained:
        memory["weights"] = WEIGHT_BYTES * model.parameters / (tp * pp) / (strategy.dp if strategy.zero == 3 else 1)
        onload = memory["weights"] / fabric.host
    parts = {
        "compute": micros * forward,
        "tp/sp": micros * block,
        "pipeline": (pp - 1) * (forward + block) + (micros + pp - 1) * hops,
        "zero": exposed,
        "offload": onload,
        "call": machine.efficiency.call_s,
    }
    parts = scaled(parts, machine.efficiency.infer_scale)
    return NodeCost(sum(parts.values()), parts, memory, f"{micros} pass{'es' if micros > 1 else ''}")


def _slowest_stage(model: ModelSpec, pp: int) -> float:
    """How much longer the slowest pipeline stage takes than an even share: uneven layers, and the head on the last."""
    if pp == 1:
        return 1.0
    total = model.active
    head = total - model.layers * model.active_layer
    usual = ceil(model.layers / pp) * model.active_layer
    last = (model.layers // pp) * model.active_layer + head
    return max(usual, last) * pp / total


def _block_s(model: ModelSpec, tokens: float, strategy: Strategy, fabric: Fabric) -> float:
    """Collectives inside the layers of one forward pass of a micro-batch of `tokens` tokens (of the whole tp/sp group)."""
    layers = model.layers / strategy.pp
    if strategy.tp > 1:  # Two all-reduces of the hidden state per layer (Shoeybi et al. 2019).
        return layers * 2.0 * fabric.all_reduce_s(2.0 * tokens * model.hidden, strategy.tp)
    if strategy.sp > 1:  # Queries, keys, values in, attention out: all-to-all each (Jacobs et al. 2023).
        width = (2 * model.heads + 2 * model.kv_heads) * model.head_dim
        return layers * fabric.all_to_all_s(2.0 * tokens / strategy.sp * width, strategy.sp)
    return 0.0


def _stage_transfer_s(model: ModelSpec, tokens: float, strategy: Strategy, machine: Machine) -> float:
    """Hidden states of a micro-batch to the next pipeline stage; tp ranks send a share each."""
    if strategy.pp == 1:
        return 0.0
    volume, node = 2.0 * tokens * model.hidden, machine.cluster.gpus_per_node
    if strategy.gpus <= node:
        return volume / strategy.tp / machine.fabric.link
    return volume / (machine.fabric.network * min(1.0, strategy.tp / node))


def _optimizer_s(model: ModelSpec, strategy: Strategy, machine: Machine) -> float:
    """One Adam step: read and write its state; on the host with gradients down and weights up, if offloaded."""
    own = model.parameters / (strategy.tp * strategy.pp * strategy.dp * strategy.sp)
    traffic = own * (2.0 * OPTIMIZER_BYTES + GRADIENT_BYTES + WEIGHT_BYTES)
    if not strategy.offload:
        return traffic / (machine.cluster.gpu.hbm_bytes_per_s * machine.efficiency.hbm_weights)
    on_node = min(strategy.gpus, machine.cluster.gpus_per_node)
    copies = own * (GRADIENT_BYTES + WEIGHT_BYTES) / machine.fabric.host
    return copies + traffic * on_node / machine.efficiency.cpu_adam_bytes_per_s
