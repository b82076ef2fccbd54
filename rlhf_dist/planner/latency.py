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

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from rlhf_dist.planner.collectives import Fabric
from rlhf_dist.planner.efficiency import Efficiency
from rlhf_dist.planner.hardware import Cluster
from rlhf_dist.planner.memory import (
    GRADIENT_BYTES,
    OPTIMIZER_BYTES,
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

TRAINING_PARTS = ("compute", "tp/sp", "pipeline", "zero", "optimizer", "call")
TRAINING_MEMORY = ("gradients", "activations", "logits", "gathered")
INFERENCE_PARTS = ("compute", "tp/sp", "pipeline", "zero", "offload", "call")
INFERENCE_MEMORY = ("activations", "logits", "gathered", "weights")
INFERENCE_MICRO_TOKENS = 32768.0
"""Most tokens of a forward pass without backward: more gives the matrix units nothing."""


class NodeCost(NamedTuple):
    """What a node costs under a strategy. A search makes tens of thousands, so names and texts are put in later."""

    seconds: float
    part_names: tuple[str, ...] = ()
    part_seconds: tuple[float, ...] = ()
    memory_names: tuple[str, ...] = ()
    memory_bytes: tuple[float, ...] = ()
    passes: int = 0
    """Micro-batches of a training or inference node."""
    rows: float = 0.0
    """Rows of one of them; for generation those of a replica."""
    recompute: bool = False
    """Whether activations are computed again in the backward pass."""
    text: str = ""
    """How it runs, where passes do not say it."""
    layout: Strategy | None = None
    """The layout it runs under, where that is not the one its role is held in."""

    @property
    def parts(self) -> dict[str, float]:
        """Where the seconds go: compute, communication, offload, ..."""
        return dict(zip(self.part_names, self.part_seconds, strict=True))

    @property
    def memory(self) -> dict[str, float]:
        """Tensor class -> bytes per GPU needed while it runs, beside what roles hold at rest."""
        return dict(zip(self.memory_names, self.memory_bytes, strict=True))

    @property
    def needed(self) -> float:
        """Bytes per GPU needed while it runs, beside what roles hold at rest."""
        return sum(self.memory_bytes)

    @property
    def note(self) -> str:
        """How it runs, for people."""
        if not self.passes:
            return self.text
        what = f"{self.passes} pass{'es' if self.passes > 1 else ''} of {self.rows:.3g} rows"
        what += ", recompute" if self.recompute else ""
        return f"{what}, as {self.layout.text}" if self.layout is not None else what


def cost_of(
    parts: Mapping[str, float],
    memory: Mapping[str, float],
    scale: float,
    *,
    text: str = "",
) -> NodeCost:
    """A cost from named parts; `scale`: how much longer it takes by measured runs (`Efficiency.*_scale`)."""
    seconds = tuple(value * scale for value in parts.values())
    return NodeCost(sum(seconds), tuple(parts), seconds, tuple(memory), tuple(memory.values()), text=text)


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

    def forward_s(self, model: ModelSpec, tokens: float, squares: float, ranks: int, pass_tokens: float) -> float:
        """A forward pass shared by `ranks` GPUs, of which each sees `pass_tokens` tokens at a time."""
        flops = model.forward_flops(tokens, squares)
        if model.experts:
            flops += model.expert_flops(tokens) * self.efficiency.experts_half_width / model.expert_intermediate
        return flops / ranks / self.flops * (1.0 + self.efficiency.matmul_half_tokens / max(pass_tokens, 1.0))


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


def floor_s(
    model: ModelSpec, work: NodeWork, load: Workload, sizes: tuple[int, int], machine: Machine, *, pipeline: bool
) -> float:
    """Seconds that training or inference takes at least on any number of GPUs between the two `sizes`.

    Its FLOPs, spread evenly over the most GPUs; or what an update must move between the fewest nodes: every node
    takes in what it lacks of the parameters and of the gradients. A pipeline would move less.
    """
    fewest, most = sizes
    flops = model.forward_flops(work.rows * load.row_tokens, work.rows * load.row_squares) / most / machine.flops
    if work.phase != "train":
        return machine.efficiency.infer_scale * flops
    nodes, moved = fewest // machine.cluster.gpus_per_node, 0.0
    if nodes > 1 and not pipeline:
        volume = (WEIGHT_BYTES + GRADIENT_BYTES) * model.parameters * (nodes - 1) / nodes
        moved = work.mini_batches * work.epochs * volume / machine.fabric.network
    return machine.efficiency.train_scale * max(3.0 * work.epochs * flops, moved)


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
    own, ranks = model.parameters / (strategy.tp * strategy.pp), strategy.dp * strategy.sp
    gather = machine.fabric.gather_s(WEIGHT_BYTES * own, ranks, strategy.tp)
    both = gather, gather * GRADIENT_BYTES / WEIGHT_BYTES
    ways = []
    for again in (False, True) if recompute is None else (recompute,):
        for micros in _cuts(rows) if strategy.pp == 1 else (rows,):
            cost = _training(model, work, load, strategy, machine, rows / micros, micros, again, both)
            ways.append((cost.needed, cost))
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
    collectives: tuple[float, float],
) -> NodeCost:
    """One way: `collectives` are the seconds of gathering all parameters and of scattering all gradients."""
    tp, sp, pp, fabric = strategy.tp, strategy.sp, strategy.pp, machine.fabric
    tokens, squares = micro_rows * load.row_tokens, micro_rows * load.row_squares
    forward = machine.forward_s(model, tokens, squares, tp * sp * pp, tokens / sp)
    forward *= _slowest_stage(model, pp)
    passes = 4.0 if recompute else 3.0
    block = _block_s(model, tokens, strategy, fabric)
    hops = 2.0 * _stage_transfer_s(model, tokens, strategy, machine)
    front, back = forward + block, (passes - 1.0) * (forward + block)

    gather, scatter = collectives
    hide = machine.efficiency.overlap
    if strategy.zero == 3:
        exposed = micros * (max(0.0, gather - hide * front) + max(0.0, gather + scatter - hide * back))
    elif strategy.zero == 2:
        exposed = max(0.0, gather - hide * front) + micros * max(0.0, scatter - hide * back)
    else:
        exposed = max(0.0, gather - hide * front) + max(0.0, scatter - hide * back)

    updates = work.mini_batches * work.epochs
    slots = micros + pp - 1
    scale = machine.efficiency.train_scale
    seconds = (
        scale * updates * micros * passes * forward,
        scale * updates * micros * passes * block,
        scale * updates * ((slots - micros) * passes * (forward + block) + slots * hops),
        scale * updates * exposed,
        scale * updates * _optimizer_s(model, strategy, machine),
        scale * machine.efficiency.call_s,
    )
    kept, at_work = activation_bytes_per_token(model, strategy, recompute=recompute)
    # Rows are balanced by tokens, but the longest one must fit by itself.
    most = max(tokens, load.longest)
    memory = (
        gradient_bytes(model, strategy),
        (kept + at_work) * most,
        logit_bytes(model, strategy),
        gathered_bytes(model, strategy),
    )
    return NodeCost(sum(seconds), TRAINING_PARTS, seconds, TRAINING_MEMORY, memory, micros, micro_rows, recompute)


def inference_variants(
    model: ModelSpec, work: NodeWork, load: Workload, strategy: Strategy, machine: Machine, *, trained: bool
) -> Variants:
    """Ways to run a forward pass over the rows: fewer, larger passes need more memory."""
    rows = ceil(work.rows / strategy.dp)
    least = min(rows, max(1, ceil(rows * load.row_tokens / INFERENCE_MICRO_TOKENS)))
    if strategy.pp > 1:
        least = min(rows, max(least, 4 * strategy.pp))
    own, ranks = model.parameters / (strategy.tp * strategy.pp), strategy.dp * strategy.sp
    gather = machine.fabric.gather_s(WEIGHT_BYTES * own, ranks, strategy.tp) if strategy.zero == 3 else 0.0
    ways = []
    for micros in (cut for cut in sorted({least, *_cuts(rows)}) if cut >= least):
        cost = _inference(model, load, strategy, machine, rows / micros, micros, trained, gather)
        ways.append((cost.needed, cost))
    return staircase(ways)


def _inference(
    model: ModelSpec,
    load: Workload,
    strategy: Strategy,
    machine: Machine,
    micro_rows: float,
    micros: int,
    trained: bool,
    gather: float,
) -> NodeCost:
    tp, sp, pp, fabric = strategy.tp, strategy.sp, strategy.pp, machine.fabric
    tokens, squares = micro_rows * load.row_tokens, micro_rows * load.row_squares
    forward = machine.forward_s(model, tokens, squares, tp * sp * pp, tokens / sp)
    forward *= _slowest_stage(model, pp)
    block = _block_s(model, tokens, strategy, fabric)
    hops = _stage_transfer_s(model, tokens, strategy, machine)
    exposed = 0.0
    if strategy.zero == 3:
        exposed = micros * max(0.0, gather - machine.efficiency.overlap * (forward + block))
    _, at_work = activation_bytes_per_token(model, strategy, recompute=True)
    weights = onload = 0.0
    if strategy.offload and not trained:
        weights = WEIGHT_BYTES * model.parameters / (tp * pp) / (strategy.dp if strategy.zero == 3 else 1)
        onload = weights / fabric.host
    memory = (
        at_work * max(tokens, load.longest),
        logit_bytes(model, strategy),
        gathered_bytes(model, strategy),
        weights,
    )
    scale = machine.efficiency.infer_scale
    seconds = (
        scale * micros * forward,
        scale * micros * block,
        scale * ((pp - 1) * (forward + block) + (micros + pp - 1) * hops),
        scale * exposed,
        scale * onload,
        scale * machine.efficiency.call_s,
    )
    return NodeCost(sum(seconds), INFERENCE_PARTS, seconds, INFERENCE_MEMORY, memory, micros, micro_rows)


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
    """Collectives inside the layers of one forward pass; `tokens` are those of the whole tp or sp group."""
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
