"""In-place weights for a vLLM model: written by vLLM's own loaders, read back, and packed anew on a CPU.

vLLM's CPU layers pack their weights for oneDNN and drop the originals, after which nothing can be written
or read back. Here they keep both: parameters stay real tensors, and packing is repeated after each sync.
That costs a second copy of the weights in CPU memory and keeps the packed kernels' speed (measured for 135M
parameters, one thread, fp32, before any checks: sync 0.3 s at 290 tok/s; `reload_weights` 0.6 s at 280; no
packing 0.06 s at 135).

    begin:   every parameter = NaN, every packed kernel dropped     what is not replaced cannot look right
    install: model.load_weights(...)                                vLLM maps names, fuses and slices
    finish:  pack; no NaN left; each kernel == its parameter        tied embeddings included
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import vllm.model_executor.layers.utils as vllm_layers
from torch import Tensor, nn

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of a packed kernel from its parameter, as a share of the largest output."""

_pack_layer: Callable[..., None] = vllm_layers.dispatch_cpu_unquantized_gemm


@contextmanager
def parameters_kept() -> Iterator[None]:
    """vLLM models built inside keep the parameters they pack."""

    def keep(layer: nn.Module, remove_weight: bool) -> None:
        _pack_layer(layer, remove_weight=False)

    original = vllm_layers.dispatch_cpu_unquantized_gemm
    vllm_layers.dispatch_cpu_unquantized_gemm = keep
    try:
        yield
    finally:
        vllm_layers.dispatch_cpu_unquantized_gemm = original


@torch.no_grad()
def invalidate(model: nn.Module) -> None:
    """Fill every parameter with NaN and drop the packed kernels."""
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    for _, layer in _packed_layers(model):
        layer.cpu_linear = _not_packed


@torch.no_grad()
def pack(model: nn.Module) -> None:
    """Build the kernels of every packed layer from its parameter; nothing to do on a GPU."""
    for _, layer in _packed_layers(model):
        _pack_layer(layer, remove_weight=False)


@torch.no_grad()
def unwritten(model: nn.Module) -> list[str]:
    """Parameters (vLLM's names) with a NaN in them: part of them was never written, or what arrived has one."""
    return [name for name, parameter in model.named_parameters() if bool(parameter.sum().isnan())]


@torch.no_grad()
def mispacked(model: nn.Module) -> list[str]:
    """Layers whose packed kernel does not compute what their parameter says."""
    return [name for name, layer in _packed_layers(model) if not _kernel_agrees(layer)]


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
