"""In-place weights for a vLLM model: written by vLLM's own loaders, read back, and packed anew on a CPU.

vLLM's CPU layers pack their weights for oneDNN and drop the originals, after which nothing can be written
or read back. Here they keep both: parameters stay real tensors, and packing is repeated after each sync.
That costs a second copy of the weights in CPU memory and keeps the packed kernels' speed (measured for 135M
parameters, one thread, fp32, before any checks: sync 0.3 s at 290 tok/s; `reload_weights` 0.6 s at 280; no
packing 0.06 s at 135).

    begin:   every packed kernel dropped; whole tensors: every parameter = NaN   what is not replaced shows
    install: model.load_weights(...), or shards written into the windows         vLLM maps names, fuses and slices
             that vllm_trace.py has learned from it
    finish:  pack; no NaN left; each kernel == its parameter                     tied embeddings included

Mixture-of-experts layers pack in place of their parameters; here the plain ones are kept aside and put back while
weights are written. (On CUDA the engine asks for the one backend, Triton, that leaves experts as they were loaded: the
others swap, pad or permute them in place.) What latent attention derives from its weights is derived anew by `pack`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vllm.model_executor.layers.utils as vllm_layers
from torch import Tensor, nn
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of a packed kernel from its parameter, as a share of the largest output."""

_pack_layer: Callable[..., None] = vllm_layers.dispatch_cpu_unquantized_gemm
_pack_experts: Callable[..., None] = CPUUnquantizedExperts.process_weights_after_loading
_EXPERT_WEIGHTS = ("w13_weight", "w2_weight")
_PLAIN_EXPERTS = ("TRITON", "BATCHED_TRITON", "CPU")
"""vLLM's backends for experts that compute with parameters as they were loaded (on a CPU: kept aside, see above)."""


@contextmanager
def parameters_kept() -> Iterator[None]:
    """vLLM models built inside keep the parameters they pack."""

    def keep(layer: nn.Module, remove_weight: bool) -> None:
        _pack_layer(layer, remove_weight=False)

    def keep_experts(experts: CPUUnquantizedExperts, layer: Any) -> None:
        layer.plain_experts = {name: getattr(layer, name).data for name in _EXPERT_WEIGHTS}
        layer.pack_experts = lambda: _pack_experts(experts, layer)
        _pack_experts(experts, layer)

    original = vllm_layers.dispatch_cpu_unquantized_gemm
    vllm_layers.dispatch_cpu_unquantized_gemm = keep
    CPUUnquantizedExperts.process_weights_after_loading = keep_experts
    try:
        yield
    finally:
        vllm_layers.dispatch_cpu_unquantized_gemm = original
        CPUUnquantizedExperts.process_weights_after_loading = _pack_experts


def check_experts(model: nn.Module) -> None:
    """Raises ValueError for experts that vLLM has rearranged after loading and keeps the shape of: what a sync writes
    into them would be read as other numbers."""
    for name, layer in model.named_modules():
        if not all(hasattr(layer, weight) for weight in _EXPERT_WEIGHTS):
            continue
        method = getattr(layer, "quant_method", None)
        backend = getattr(getattr(method, "unquantized_backend", None), "name", type(method).__name__)
        if backend not in _PLAIN_EXPERTS:
            raise ValueError(
                f"vLLM computes the experts of {name} with {backend}, which rearranges their weights after loading, so "
                f"that none could be synced; it may be {', '.join(_PLAIN_EXPERTS)}: unset VLLM_* variables that choose "
                "a backend, or set rollout.engine=transformers"
            )


@torch.no_grad()
def open_for_writing(model: nn.Module) -> None:
    """Drop the packed kernels and put plain parameters where loaders look for them, until `pack`."""
    for _, layer in _packed_layers(model):
        layer.cpu_linear = _not_packed
    for layer in _expert_layers(model):
        for name, plain in layer.plain_experts.items():
            getattr(layer, name).data = plain


@torch.no_grad()
def invalidate(model: nn.Module) -> None:
    """Open for writing, and fill every parameter with NaN."""
    open_for_writing(model)
    for _, parameter in loaded_parameters(model):
        parameter.fill_(torch.nan)


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Build what is made of parameters anew: the kernels of packed layers (on a CPU), derived parameters."""
    for _, layer in _packed_layers(model):
        _pack_layer(layer, remove_weight=False)
    for layer in _expert_layers(model):
        layer.pack_experts()
    for attention in _latent_attentions(model):
        attention.process_weights_after_loading(attention.W_UV.dtype)


@torch.no_grad()
def unwritten(model: nn.Module) -> list[str]:
    """Parameters (vLLM's names) with a NaN in them: part of them was never written, or what arrived has one."""
    return [name for name, parameter in loaded_parameters(model) if bool(parameter.sum().isnan())]


def plain_weights(model: nn.Module) -> list[Tensor]:
    """Every parameter as loaders see it: of what packs in place, the plain one that is kept aside."""
    packed = {id(getattr(layer, name)) for layer in _expert_layers(model) for name in layer.plain_experts}
    plain = [tensor for layer in _expert_layers(model) for tensor in layer.plain_experts.values()]
    return [*(p for p in model.parameters() if id(p) not in packed), *plain]


def loaded_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that a loader writes: all but what latent attention derives from them."""
    derived = {id(p) for attention in _latent_attentions(model) for p in attention.parameters(recurse=False)}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in derived]


@torch.no_grad()
def mispacked(model: nn.Module) -> list[str]:
    """Layers whose packed kernel does not compute what their parameter says."""
    return [name for name, layer in _packed_layers(model) if not _kernel_agrees(layer)]


def _latent_attentions(model: nn.Module) -> list[MLAAttention]:
    # One that has packed its weights for AMX and dropped them has nothing to derive from: loading says so.
    return [m for m in model.modules() if isinstance(m, MLAAttention) and hasattr(m, "W_UV")]


def _expert_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if hasattr(layer, "plain_experts")]


def _packed_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "cpu_linear")]


def _kernel_agrees(layer: Any) -> bool:
    weight: Tensor = layer.weight
    if layer.cpu_linear is _not_packed:
        return False
    # A fixed input without structure or zeros; the global random stream belongs to the trainer.
    probe = torch.linspace(1.0, 40.0, weight.shape[1]).mul(17.0).sin().to(weight.dtype)[None]
    wanted = nn.functional.linear(probe, weight).float()
    got = layer.cpu_linear(probe, weight, None).float()
    return bool((got - wanted).abs().max() <= _TOLERANCE[weight.dtype] * wanted.abs().max() + 1e-30)


def _not_packed(*_: Any) -> Tensor:
    raise AssertionError("this layer's weights changed and were not packed again: call pack(model) after writing them")
