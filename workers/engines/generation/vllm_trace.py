"""Where vLLM's own weight loader puts every element: learned by running it on probes that hold no data.

    probes      one tensor per checkpoint parameter on torch's meta device: shapes and strides, no memory
    run         model.load_weights(probes), while a dispatch mode watches
    seen        param_view.copy_(probe_view): both are strided windows into known storage, so this says
                "box [0:64, 0:128] of q_proj lies at qkv_proj[0:64]" with fusing, slicing, transposing, padding and
                tensor parallelism done by vLLM's code; nothing is written

What a window cannot express (a copy of something computed from a probe, an element taken twice in one window) is
`Untraceable`: such a model takes whole tensors through the same loader instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_dist.reshard.layout import Box
from workers.engines.files.file_tensors import box_of
from workers.engines.generation import vllm_weights
from workers.engines.generation.interface import Untraceable


@dataclass(frozen=True)
class Window:
    """A strided view of a model parameter, to be taken afresh each time: parameters may be given new memory."""

    parameter: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def view(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The view."""
        return torch.as_strided(parameters[self.parameter].detach(), self.size, self.stride, self.offset)


@dataclass(frozen=True)
class Tracing:
    """What the loader does with the checkpoint on this rank."""

    boxes: dict[str, list[tuple[Box, Window]]]
    """Per checkpoint parameter: where each of its boxes goes."""
    copies: list[tuple[Window, Window]] = field(default_factory=list)
    """(from, to): boxes that go to a second place as well, filled from the first."""
    constants: list[tuple[Window, float]] = field(default_factory=list)
    """Padding."""

    @torch.no_grad()
    def complete(self, model: nn.Module) -> None:
        """Write what is not a box of the checkpoint: second places and padding."""
        parameters = dict(model.named_parameters())
        for first, second in self.copies:
            second.view(parameters).copy_(first.view(parameters))
        for window, value in self.constants:
            window.view(parameters).fill_(value)


def trace(model: nn.Module, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> Tracing:
    """Trace `model.load_weights` for checkpoint parameters of these shapes. Nothing in the model changes.

    Raises Untraceable with the reason.
    """
    probes = {name: torch.empty(tuple(shape), dtype=dtype, device="meta") for name, shape in shapes.items()}
    watch = _Watch(model, probes)
    try:
        with torch.no_grad(), watch:
            model.load_weights(iter(probes.items()))  # type: ignore[operator]
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(f"vLLM's loader cannot run on tensors without data: {error!r}") from error
    watch.check_complete()
    try:
        return _tracing(watch)
    except ValueError as error:
        raise Untraceable(str(error)) from error


@dataclass
class _Write:
    window: Window
    source: tuple[str, tuple[int, ...], tuple[int, ...], int] | None
    """(checkpoint parameter, size, stride, offset) of the probe's view; None for a constant."""
    value: float = 0.0


class _Watch(TorchDispatchMode):
    """Records what is written into parameters, and lets nothing be written."""

    def __init__(self, model: nn.Module, probes: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._model = model
        self._find_parameters()
        self._probes = {_memory(probe): name for name, probe in probes.items()}
        self._keep = list(probes.values())
        self.shapes = {name: tuple(probe.shape) for name, probe in probes.items()}
        self.writes: list[_Write] = []

    def _find_parameters(self) -> None:
        self._parameters: dict[int, tuple[str, Tensor]] = {}
        for name, parameter in vllm_weights.loaded_parameters(self._model):
            self._parameters[_memory(parameter)] = (name, parameter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        into = args[0] if args and isinstance(args[0], Tensor) and func._schema.is_mutable else None
        if into is not None and _memory(into) not in self._parameters and _memory(args[-1]) in self._probes:
            self._find_parameters()  # some loaders add a parameter (a head's bias) when its weight comes
        if into is None or _memory(into) not in self._parameters:
            return func(*args, **(kwargs or {}))
        name, parameter = self._parameters[_memory(into)]
        window = Window(name, tuple(into.shape), into.stride(), int(into.storage_offset()))
        if func is torch.ops.aten.copy_.default:
            source = args[1].expand_as(into)
            probe = self._probes.get(_memory(source))
            if probe is None:
                raise Untraceable(f"{name} is written with something computed from the checkpoint, not a part of it")
            view = (probe, tuple(source.shape), source.stride(), source.storage_offset())
            self.writes.append(_Write(window, view))
        elif func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default):
            self.writes.append(_Write(window, None, float(args[1]) if len(args) > 1 else 0.0))
        else:
            raise Untraceable(f"{name} is written by {func}, which is no copy")
        return into

    def check_complete(self) -> None:
        """Raise Untraceable unless every element of every parameter was written."""
        written: dict[str, int] = {}
        for write in self.writes:
            written[write.window.parameter] = written.get(write.window.parameter, 0) + prod(write.window.size)
        for name, parameter in self._parameters.values():
            if written.get(name, 0) != parameter.numel():
                raise Untraceable(f"{written.get(name, 0)} of {parameter.numel()} elements of {name} are loaded")


def _memory(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata) if isinstance(tensor, Tensor) else 0


def _tracing(watch: _Watch) -> Tracing:
    found: dict[str, dict[Box, Window]] = {}
    copies, constants = [], []
    for write in watch.writes:
        if write.source is None:
            constants.append((write.window, write.value))
            continue
        name, size, stride, offset = write.source
        if not prod(size):
            continue
        box, order = box_of(name, watch.shapes[name], size, stride, offset)
        w = write.window
        # The window's dims in the order of the parameter's; dims of one element have no stride of their own.
        window = Window(
            w.parameter,
            tuple(w.size[k] if k is not None else 1 for k in order),
            tuple(w.stride[k] if k is not None else 0 for k in order),
            w.offset,
        )
        places = found.setdefault(name, {})
        if box in places:
            copies.append((places[box], window))
        else:
            places[box] = window
    return Tracing({name: list(places.items()) for name, places in found.items()}, copies, constants)
