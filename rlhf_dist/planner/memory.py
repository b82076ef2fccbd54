"""Bytes per GPU: what a role holds all the time, and what an operation needs while it runs.

    at rest    weights (bf16), optimizer state (fp32 master, two Adam moments), unless offloaded
    training   gradients (fp32), activations, logits of one chunk, gathered parameters (ZeRO-3)
    inference  activations of one layer, logits of one chunk, gathered parameters
    generation its own copy of the weights, CUDA graphs, keys and values

Sources: mixed precision as in ZeRO (Rajbhandari et al. 2020, 2 + 2 + 12 bytes per parameter; gradients are kept and
reduced in fp32, so 2 + 4 + 12); activations as in Korthikanti et al. 2022, eq. 2, with flash attention (no s^2 term).
"""

from __future__ import annotations

from rlhf_dist.hardware import Cluster
from rlhf_dist.model_specs import ModelSpec
from rlhf_dist.planner.efficiency import Efficiency
from rlhf_dist.planner.strategy import Generation, Strategy

WEIGHT_BYTES = 2.0
GRADIENT_BYTES = 4.0
OPTIMIZER_BYTES = 12.0
LOGIT_CHUNK_TOKENS = 1024
"""Tokens whose logits exist at one time (EngineConfig.logit_chunk_tokens)."""
LOGIT_BYTES = 10.0
"""Of one logit: bf16 and fp32 copies, and the gradient."""


def gib(value: float) -> str:
    """Bytes in GiB, for people."""
    return f"{value / (1 << 30):.1f} GiB"


def usable_bytes(cluster: Cluster, efficiency: Efficiency) -> float:
    """What a GPU has left for tensors once contexts are there and fragments are lost."""
    return cluster.gpu.memory_bytes * (1.0 - efficiency.fragmentation) - efficiency.context_bytes


def resting_bytes(model: ModelSpec, strategy: Strategy, *, trained: bool) -> dict[str, float]:
    """Tensor class -> bytes per GPU that a role holds while others run."""
    own = model.parameters / (strategy.tp * strategy.pp)
    ranks = strategy.dp * strategy.sp
    weights = WEIGHT_BYTES * own / (ranks if strategy.zero == 3 else 1)
    if not trained:
        return {"weights": 0.0 if strategy.offload else weights}
    optimizer = OPTIMIZER_BYTES * own / ranks
    return {"weights": weights, "optimizer": 0.0 if strategy.offload else optimizer}


def host_bytes(model: ModelSpec, strategy: Strategy, *, trained: bool) -> float:
    """What an offloaded role keeps in the host's memory, bytes for each GPU of its node."""
    if not strategy.offload:
        return 0.0
    own = model.parameters / (strategy.tp * strategy.pp)
    if trained:
        return OPTIMIZER_BYTES * own / (strategy.dp * strategy.sp)
    return WEIGHT_BYTES * own / (strategy.dp if strategy.zero == 3 else 1)


def gradient_bytes(model: ModelSpec, strategy: Strategy) -> float:
    """Gradients that are accumulated while a role trains, bytes per GPU."""
    own = model.parameters / (strategy.tp * strategy.pp)
    return GRADIENT_BYTES * own / (strategy.dp * strategy.sp if strategy.zero >= 2 else 1)


def gathered_bytes(model: ModelSpec, strategy: Strategy) -> float:
    """Parameters of two layers (one computed, one prefetched) and the embedding, where ZeRO-3 gathers them."""
    if strategy.zero != 3:
        return 0.0
    return WEIGHT_BYTES * (2 * model.layer + model.vocabulary * model.hidden) / strategy.tp


def activation_bytes_per_token(model: ModelSpec, strategy: Strategy, *, recompute: bool) -> tuple[float, float]:
    """(bytes that stay for the backward pass, bytes of the layer at work) for one token of a micro-batch, per GPU."""
    width = model.intermediate if not model.experts else 0
    width += model.experts_per_token * model.expert_intermediate + model.shared_intermediate
    dim = model.head_dim
    layer = 6.0 * model.hidden + 4.0 * model.heads * dim + 4.0 * model.expanded_kv_heads * dim + 6.0 * width
    share = strategy.tp * strategy.sp
    # A pipeline's first stage holds pp micro-batches at a time, each with layers / pp layers: the pp cancels.
    kept = model.layers * (2.0 * model.hidden if recompute else layer) / share
    return kept, 2.0 * layer / share


def logit_bytes(model: ModelSpec, strategy: Strategy) -> float:
    """Logits of one chunk and what is made of them, bytes per GPU."""
    outputs = 1 if model.scalar_head else model.vocabulary
    return LOGIT_BYTES * LOGIT_CHUNK_TOKENS * outputs / strategy.tp


def generation_weights(model: ModelSpec, generation: Generation) -> float:
    """The generation engine's copy of the weights, bytes per GPU."""
    return WEIGHT_BYTES * model.parameters / (generation.tp * generation.pp)


def kv_bytes_per_token(model: ModelSpec, generation: Generation) -> float:
    """Keys and values of one token, bytes per GPU; heads are repeated where tp is larger than their number."""
    return model.kv_bytes_per_token() / (min(generation.tp, model.kv_heads) * generation.pp)
