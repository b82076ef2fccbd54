"""Weights under the names of a model's files, where a model in memory fuses, splits or transposes them.

    file    block_sparse_moe.experts.1.w3.weight  [I, H]
    memory  mlp.experts.gate_up_proj  [E, 2 I, H]              this file tensor is its box [1:2, I:2 I, 0:H]

A file tensor is a few *parts*, each a box of it that is a box of one parameter, dims in any order; so a layout of
parameters is a layout of file tensors too, and shards of one are views of shards of the other: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from rlhf_dist.reshard.layout import Box, Ints, Layout, ParameterLayout
from rlhf_dist.reshard.shards import Shards


@dataclass(frozen=True)
class Part:
    """A box of a file tensor that is a box of a parameter."""

    file_box: Box
    parameter: str
    box: Box
    dims: tuple[int | None, ...]
    """For each dim of the file tensor the parameter's dim along it; None where it has one element and no such dim."""

    def meet(self, start: Ints, stop: Ints) -> tuple[Ints, Ints, Ints]:
        """Which of the parameter's boxes [n, dims] meet this part, and [m, dims] the corners of what they share."""
        edges = np.array(self.box, np.int64).reshape(-1, 2)
        low, high = np.maximum(start, edges[:, 0]), np.minimum(stop, edges[:, 1])
        met = np.flatnonzero((high > low).all(axis=1))
        return met, low[met], high[met]

    def in_file(self, corner: Ints, last: bool) -> Ints:
        """[m, dims] corners in the parameter -> in the file tensor; `last`: one past the last element."""
        columns = [
            np.full(len(corner), edges[last]) if dim is None else corner[:, dim] - self.box[dim][0] + edges[0]
            for dim, edges in zip(self.dims, self.file_box, strict=True)
        ]
        return np.stack(columns, axis=1) if columns else np.zeros((len(corner), 0), np.int64)

    def view(self, tensor: Tensor) -> Tensor:
        """A box of the parameter inside this part, as the box of the file tensor that it is."""
        named = [dim for dim in self.dims if dim is not None]
        rest = [dim for dim in range(tensor.ndim) if dim not in named]
        view = tensor.permute((*named, *rest))
        for _ in rest:
            view = view.select(-1, 0)
        for place, dim in enumerate(self.dims):
            if dim is None:
                view = view.unsqueeze(place)
        return view


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a model's files."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


Cut = tuple[Part, int, tuple[slice, ...]]
"""A part, which of the rank's shards of its parameter, and where in that shard."""


class FileTensors(Mapping[str, FileTensor]):
    """The tensors of a model's files by name, and how they lie in its parameters."""

    def __init__(self, tensors: Mapping[str, FileTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """shapes: of the parameters. Raises ValueError unless every element of a parameter is in one file tensor."""
        self._tensors, self.shapes = dict(tensors), dict(shapes)
        taken: dict[str, int] = dict.fromkeys(shapes, 0)
        for tensor in tensors.values():
            for part in tensor.parts:
                taken[part.parameter] += prod(stop - start for start, stop in part.box)
        if wrong := [name for name, count in taken.items() if count != prod(shapes[name])]:
            raise ValueError(f"{taken[wrong[0]]} of {prod(shapes[wrong[0]])} elements of {wrong[0]} are in the files")

    def __getitem__(self, name: str) -> FileTensor:
        return self._tensors[name]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @cached_property
    def same(self) -> dict[str, str]:
        """File tensor -> parameter, where the one is the other as it stands: neither cut, joined nor turned."""
        return {
            name: tensor.parts[0].parameter
            for name, tensor in self._tensors.items()
            if tensor == as_it_stands(first := tensor.parts[0].parameter, self.shapes[first])
        }

    @cached_property
    def groups(self) -> list[tuple[list[str], list[str]]]:
        """(parameters, file tensors) that are made of each other and of nothing else, in the parameters' order."""
        users: dict[str, list[str]] = {name: [] for name in self.shapes}
        for name, tensor in self._tensors.items():
            for parameter in dict.fromkeys(part.parameter for part in tensor.parts):
                users[parameter].append(name)
        found: list[tuple[list[str], list[str]]] = []
        seen: set[str] = set()
        for first in self.shapes:
            if first in seen:
                continue
            parameters, files = {first: None}, dict.fromkeys(users[first])
            grown = 0
            while grown != (grown := len(parameters) + len(files)):
                parameters |= {part.parameter: None for name in files for part in self._tensors[name].parts}
                files |= {name: None for parameter in parameters for name in users[parameter]}
            seen |= parameters.keys()
            found.append((list(parameters), list(files)))
        return found

    def layout(self, parameters: Layout) -> Layout:
        """What the ranks hold of the file tensors."""
        return Layout(parameters.world, {name: self._layout(name, parameters) for name in self})

    def _layout(self, name: str, parameters: Layout) -> ParameterLayout:
        if name in self.same:
            return parameters.parameters[self.same[name]]
        tensor = self._tensors[name]
        pieces = []
        for part in tensor.parts:
            held = parameters.parameters[part.parameter]
            met, low, high = part.meet(held.start, held.stop)
            pieces.append((held.rank[met], part.in_file(low, last=False), part.in_file(high, last=True)))
        dtype = parameters.parameters[tensor.parts[0].parameter].dtype
        rank, start, stop = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
        return ParameterLayout(tensor.shape, dtype, rank, start, stop)

    def cuts(self, parameters: Layout, rank: int) -> dict[str, list[Cut]]:
        """How `shards` makes one rank's shards of `layout(parameters)`: the same for every version of the weights."""
        corners: dict[str, tuple[Ints, Ints]] = {}
        found: dict[str, list[Cut]] = {}
        for name, tensor in self.items():
            if name in self.same:
                continue
            found[name] = []
            for part in tensor.parts:
                if part.parameter not in corners:
                    held = parameters.parameters[part.parameter]
                    mine = held.rank == rank
                    corners[part.parameter] = held.start[mine], held.stop[mine]
                start, stop = corners[part.parameter]
                for k, low, high in zip(*part.meet(start, stop), strict=True):
                    inside = tuple(slice(a, b) for a, b in zip(low - start[k], high - start[k], strict=True))
                    found[name].append((part, int(k), inside))
        return found

    def shards(self, cuts: Mapping[str, Sequence[Cut]], parameters: Shards) -> dict[str, list[Tensor]]:
        """Shards of the file tensors: views of the rank's shards of the parameters."""
        return {
            name: list(parameters[self.same[name]])
            if name in self.same
            else [part.view(parameters[part.parameter][k][inside]) for part, k, inside in cuts[name]]
            for name in self
        }

    def views(self, name: str, parameters: Mapping[str, Tensor]) -> list[tuple[Box, Tensor]]:
        """The boxes of one file tensor, as views of whole parameters."""
        return [
            (part.file_box, part.view(parameters[part.parameter][tuple(slice(*edges) for edges in part.box)]))
            for part in self._tensors[name].parts
        ]

    def read(self, name: str, parameters: Mapping[str, Tensor]) -> Tensor:
        """One whole file tensor from whole parameters; a parameter itself where they are the same."""
        tensor = self._tensors[name]
        if name in self.same:
            return parameters[self.same[name]]
        whole = parameters[tensor.parts[0].parameter].new_empty(tensor.shape)
        for box, view in self.views(name, parameters):
            whole[tuple(slice(*edges) for edges in box)] = view
        return whole

    def write(self, name: str, tensor: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Copy one whole file tensor into whole parameters."""
        for box, view in self.views(name, parameters):
            view.copy_(tensor[tuple(slice(*edges) for edges in box)])

    def as_json(self) -> dict[str, Any]:
        """Those that are not a parameter of the same name, as plain data."""
        return {
            name: [list(t.shape), [[p.file_box, p.parameter, p.box, p.dims] for p in t.parts]]
            for name, t in self.items()
            if self.same.get(name) != name
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], shapes: Mapping[str, Iterable[int]]) -> FileTensors:
        """What `as_json` made; shapes: of the parameters."""
        known = {name: tuple(shape) for name, shape in shapes.items()}
        tensors = {name: FileTensor(tuple(shape), tuple(map(_part, parts))) for name, (shape, parts) in data.items()}
        used = {part.parameter for tensor in tensors.values() for part in tensor.parts}
        same = {name: as_it_stands(name, shape) for name, shape in known.items() if name not in used}
        return cls(same | tensors, known)


def as_it_stands(parameter: str, shape: tuple[int, ...]) -> FileTensor:
    """The file tensor that is a whole parameter."""
    box = whole_box(shape)
    return FileTensor(shape, (Part(box, parameter, box, tuple(range(len(shape)))),))


def whole_box(shape: Iterable[int]) -> Box:
    """All of a tensor."""
    return tuple((0, size) for size in shape)


def _part(data: Any) -> Part:
    file_box, parameter, box, dims = data
    return Part(tuple(map(tuple, file_box)), parameter, tuple(map(tuple, box)), tuple(dims))
