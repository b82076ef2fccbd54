"""Seconds of moving the actor's weights from its training holding to its generation holding.

In the same pool a GPU lacks what its training shard does not hold of its generation shard. With ranks paired as in
HybridFlow (section 5, equation for HybridFlow: the training shard lies inside the generation shard) that is
M/(t_g p_g) - M/(t p x sharding): nothing is moved twice. Between pools every replica of the target is fed once over
the network, and copies inside a node travel over its links.
"""

from __future__ import annotations

from rlhf_dist.model_specs import ModelSpec
from rlhf_dist.planner.cost import NodeCost, cost_of
from rlhf_dist.planner.memory import WEIGHT_BYTES
from rlhf_dist.planner.rates import Machine
from rlhf_dist.planner.strategy import Generation, Strategy

BUCKET_BYTES = float(1 << 30)
"""Full parameters in flight at one time."""


def received_bytes(model: ModelSpec, source: Strategy, target: Generation, *, same_pool: bool = True) -> float:
    """Bytes one GPU of the target must receive: its shard, less what it holds already."""
    size = WEIGHT_BYTES * model.parameters
    shard = size / (target.tp * target.pp)
    if not same_pool:
        return shard
    held = size / (source.tp * source.pp) / (source.dp * source.sp if source.zero == 3 else 1)
    return max(0.0, shard - held)


def reshard_s(
    model: ModelSpec, source: Strategy, target: Generation, machine: Machine, *, same_pool: bool = True
) -> tuple[float, float]:
    """Seconds of (moving, installing) the weights."""
    fabric, node = machine.fabric, machine.cluster.gpus_per_node
    size = WEIGHT_BYTES * model.parameters
    inside = received_bytes(model, source, target, same_pool=same_pool) / fabric.link
    between, wanted = 0.0, size * min(1.0, node / (target.tp * target.pp))
    if not same_pool:
        # Every node of the target takes in what its GPUs need once; the source sends the model once, in a tree.
        senders = min(source.gpus, node) / node * max(1, source.gpus // node)
        if machine.cluster.nodes > 1:
            between = max(wanted / (fabric.network * min(1.0, target.gpus / node)), size / (fabric.network * senders))
    elif source.gpus > node:
        # What one node holds of the training shards: all of it unless they are spread over nodes.
        spread = source.tp * source.pp * (source.dp * source.sp if source.zero == 3 else 1)
        between = max(0.0, wanted - size * min(1.0, node / spread)) / fabric.network
    install = size / (target.tp * target.pp) / machine.efficiency.load_bytes_per_s
    return max(inside, between), install


def total_reshard_s(model: ModelSpec, source: Strategy, target: Generation, machine: Machine) -> float:
    """Seconds of a weight sync in a pool."""
    seconds = sum(reshard_s(model, source, target, machine)) + machine.efficiency.call_s
    return machine.efficiency.reshard_scale * seconds


def reshard_cost(
    model: ModelSpec, source: Strategy, target: Generation, machine: Machine, *, same_pool: bool = True
) -> NodeCost:
    """Cost of a weight sync, in the same pool or between two."""
    size = WEIGHT_BYTES * model.parameters
    missing = received_bytes(model, source, target, same_pool=same_pool)
    moving, installing = reshard_s(model, source, target, machine, same_pool=same_pool)
    parts = {"transfer": moving, "install": installing, "call": machine.efficiency.call_s}
    memory = {"weights": size / (target.tp * target.pp), "bucket": min(BUCKET_BYTES, size)}
    shard = size / (target.tp * target.pp)
    text = f"{missing / 1e9:.2f} GB moved to each GPU, {shard / 1e9:.2f} GB loaded"
    return cost_of(parts, memory, machine.efficiency.reshard_scale, text=text)
