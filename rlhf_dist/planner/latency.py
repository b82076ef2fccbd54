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

from math import ceil

from rlhf_dist.model_specs import ModelSpec
from rlhf_dist.planner.collectives import Fabric
from rlhf_dist.planner.cost import NodeCost, Variants, staircase
from rlhf_dist.planner.memory import (
    GRADIENT_BYTES,
    OPTIMIZER_BYTES,
    WEIGHT_BYTES,
    activation_bytes_per_token,
    gathered_bytes,
    gradient_bytes,
    logit_bytes,
)
from rlhf_dist.planner.rates import Machine
from rlhf_dist.planner.strategy import Strategy
from rlhf_dist.planner.work import NodeWork
from rlhf_dist.planner.workload import Workload

TRAINING_PARTS = ("compute", "tp/sp", "pipeline", "zero", "optimizer", "call")
TRAINING_MEMORY = ("gradients", "activations", "logits", "gathered")
INFERENCE_PARTS = ("compute", "tp/sp", "pipeline", "zero", "offload", "call")
INFERENCE_MEMORY = ("activations", "logits", "gathered", "weights")
INFERENCE_MICRO_TOKENS = 32768.0
"""Most tokens of a forward pass without backward: more gives the matrix units nothing."""


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
    gather = machine.fabric.gather_s(WEIGHT_BYTES * own, ranks, strategy.tp, model.layers // strategy.pp)
    both = gather, machine.fabric.gather_s(GRADIENT_BYTES * own, ranks, strategy.tp, model.layers // strategy.pp)
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
    # Backward has twice the matmuls of forward and as many collectives; recomputing adds one forward of both.
    passes, rounds = (4.0, 3.0) if recompute else (3.0, 2.0)
    block = _block_s(model, tokens, strategy, fabric)
    hops = 2.0 * _stage_transfer_s(model, tokens, strategy, machine)
    front, back = forward + block, (passes - 1.0) * forward + (rounds - 1.0) * block

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
        scale * updates * micros * rounds * block,
        scale * updates * ((slots - micros) * (front + back) + slots * hops),
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
    gather = 0.0
    if strategy.zero == 3:
        gather = machine.fabric.gather_s(WEIGHT_BYTES * own, ranks, strategy.tp, model.layers // strategy.pp)
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
        width = (2 * model.heads + 2 * model.expanded_kv_heads) * model.head_dim
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
