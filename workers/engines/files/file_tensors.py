"""What a model's weights are called and how they are cut in its files: learned from what `save_pretrained` does.

transformers fuses, splits and renames weights while it loads them, and undoes that when it saves. Here the undoing runs
once on probes that hold no data:

    probes      one tensor per parameter on torch's meta device
    run         transformers' `revert_weight_conversion`, while a dispatch mode makes copies into views
    seen        each tensor it would write is a strided view of a probe, or a concatenation of such views

so that every family is known, without a table of families. What computes something new cannot be seen this way and is
refused by name (no causal language model of transformers 5.19 does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlhf_dist.reshard.file_tensors import FileTensor, FileTensors, Part, as_it_stands, whole_box
from rlhf_dist.reshard.layout import Box
from workers.engines.added.lora import weight_name


class UnknownFiles(ValueError):
    """A model whose files hold its weights in a way that boxes do not express."""


def file_tensors(hf: PreTrainedModel, shapes: Mapping[str, Sequence[int]]) -> FileTensors:
    """What `hf.save_pretrained` writes of the parameters (and buffers) `shapes`, by their names in memory.

    Raises UnknownFiles, naming the model.
    """
    probes = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    copies = _CopiesAreViews()
    try:
        with torch.no_grad(), copies:
            written = revert_weight_conversion(hf, dict(probes))
        names = {_memory(probe): name for name, probe in probes.items()}
        known = {name: tuple(probe.shape) for name, probe in probes.items()}
        tensors = {}
        for name, tensor in written.items():
            same = next((n for n in (names.get(_memory(tensor)),) if n and probes[n] is tensor), None)
            tensors[name] = as_it_stands(same, known[same]) if same else _file_tensor(tensor, names, known, copies)
        found = FileTensors(tensors, known)
    except Exception as error:
        raise UnknownFiles(
            f"{type(hf).__name__}: how its files hold its weights could not be learned from transformers ({error}); "
            "it can be neither exported nor synced, so it is not trained"
        ) from error
    return found


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their name in transformers' model; tied ones once.

    Adapters come under the names of `lora.py`, beside the weights they change.
    """
    return {weight_name(name.removeprefix("hf.")): parameter for name, parameter in model.named_parameters()}


def kept_buffers(hf: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a model's files, such as the routing biases of some mixtures of experts.

    Raises UnknownFiles for one of whole numbers: layouts hold weights.
    """
    found = {}
    for path, module in hf.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:
                continue
            if not buffer.is_floating_point():
                raise UnknownFiles(
                    f"{type(hf).__name__} keeps {path}.{name}, {buffer.dtype}, in its files: not supported"
                )
            found[f"{path}.{name}" if path else name] = buffer
    return found


class _CopiesAreViews(TorchDispatchMode):
    """Tensors without data need no copies: a copy made contiguous is the view it copies; joins are remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.joined: dict[int, tuple[Tensor, list[tuple[Box, Tensor]]]] = {}
        """Memory of a concatenation -> itself, and which box of it each of its sources is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.cat.default, torch.ops.aten.stack.default):
            sources, dim = list(args[0]), (args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0))
            if func is torch.ops.aten.stack.default:
                sources = [source.unsqueeze(dim) for source in sources]
            dim, at, boxes = dim % result.ndim, 0, []
            for source in sources:
                edges = [(0, size) for size in source.shape]
                edges[dim] = (at, at + source.shape[dim])
                boxes.append((tuple(edges), source))
                at += source.shape[dim]
            self.joined[_memory(result)] = (result, boxes)
        return result


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _file_tensor(
    tensor: Tensor, names: Mapping[int, str], shapes: Mapping[str, tuple[int, ...]], copies: _CopiesAreViews
) -> FileTensor:
    parts = _parts(tensor, whole_box(tensor.shape), names, shapes, copies)
    return FileTensor(tuple(tensor.shape), tuple(parts))


def _parts(
    tensor: Tensor,
    file_box: Box,
    names: Mapping[int, str],
    shapes: Mapping[str, tuple[int, ...]],
    copies: _CopiesAreViews,
) -> list[Part]:
    """`tensor` lies at `file_box` of a file tensor."""
    if parameter := names.get(_memory(tensor)):
        shape = shapes[parameter]
        box, order = box_of(parameter, shape, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        dims = tuple(order.index(k) if k in order else None for k in range(tensor.ndim))
        # A dim of one element may run along any of the parameter's: along its own, where they are in line.
        if len(shape) == tensor.ndim:
            dims = tuple(k if dim is None and order[k] is None else dim for k, dim in enumerate(dims))
        return [Part(file_box, parameter, box, dims)]
    if _memory(tensor) not in copies.joined:
        raise ValueError("a tensor is computed anew")
    joined, sources = copies.joined[_memory(tensor)]
    if tensor.shape != joined.shape or tensor.stride() != joined.stride():
        raise ValueError("what was joined is cut again")
    parts = []
    for box, source in sources:
        place = tuple((a + first, b + first) for (first, _), (a, b) in zip(file_box, box, strict=True))
        parts += _parts(source, place, names, shapes, copies)
    return parts


def box_of(
    name: str, shape: tuple[int, ...], size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> tuple[Box, list[int | None]]:
    """The box that a view of a contiguous tensor covers, and which dim of the view runs along each of its dims.

    Raises ValueError for a view that is no box.
    """
    lengths = [1] * len(shape)
    order: list[int | None] = [None] * len(shape)
    steps = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    for k, (length, step) in enumerate(zip(size, stride, strict=True)):
        if length == 1:
            continue
        dims = [dim for dim in range(len(shape)) if steps[dim] == step and shape[dim] > 1 and order[dim] is None]
        if not dims:
            raise ValueError(f"{name} of shape {list(shape)} is used through a view of strides {list(stride)}")
        lengths[dims[0]], order[dims[0]] = length, k
    start = []
    for step in steps:
        start.append(offset // step)
        offset %= step
    box = tuple((a, a + n) for a, n in zip(start, lengths, strict=True))
    if any(b > limit for (_, b), limit in zip(box, shape, strict=True)):
        raise ValueError(f"{name} of shape {list(shape)} is used through a view across its rows")
    return box, order
