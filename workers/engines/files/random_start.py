"""Random weights without the model: a unit at a time is given memory, drawn and copied to where this rank has it.

    unit      a decoder layer, or a module with no layer in it, whole; of a module with layers its own parameters
    values    what the library's `_init_weights` gives its modules, from a generator seeded by (seed, the unit's name)

so that they depend on the seed and on nothing of how the model is cut. Every rank draws every value, as it would for
the whole model; it has its shards and one unit.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_dist.reshard.file_tensors import FileTensors
from rlhf_dist.reshard.layout import Layout
from rlhf_dist.reshard.shards import Shards
from workers.engines.files.slices import ReadWhole

Unit = Sequence[tuple[str, nn.Module]]
"""Modules and their names, parents first."""


@dataclass(frozen=True)
class RandomWeights:
    """Starting values of a model whose parameters are on the meta device; fills as `FolderWeights` does."""

    hf: PreTrainedModel
    """A copy of the model that nothing else uses."""
    names: frozenset[str]
    """Its parameters, tied ones once."""
    tensors: FileTensors
    seed: int
    zeros: frozenset[str]
    """Parameters that start at zero, whatever the library does: a value head."""

    def check(self) -> None:
        """Raise ReadWhole where the library leaves values as a constructor made them, which are not there.

        One unit of each kind is drawn.
        """
        seen = set()
        for unit in self._units:
            kind = tuple((type(m), *(tuple(p.shape) for p in m.parameters(recurse=False))) for _, m in unit)
            if kind in seen:
                continue
            seen.add(kind)
            for parameter, values in self._draw(unit).items():
                if bool(values.isnan().any()):
                    raise ReadWhole(f"transformers gives {parameter} no start of its own")

    def fill(self, layout: Layout, shards: Shards, rank: int) -> None:
        """Write this rank's boxes of every file tensor. layout: of file tensors; shards: its boxes, in that order."""
        for values in self._groups():
            for file in self._files_of[next(iter(values))]:
                whole = self.tensors.read(file, values)
                held = layout.parameters[file]
                for box, shard in zip(np.flatnonzero(held.rank == rank), shards[file], strict=True):
                    shard.copy_(whole[tuple(slice(int(a), int(b)) for a, b in held.box(int(box)))])

    def fill_whole(self, tensors: FileTensors, parameters: Mapping[str, Tensor]) -> None:
        """Write whole parameters."""
        for values in self._groups():
            for name, value in values.items():
                parameters[name].copy_(value)

    @cached_property
    def _files_of(self) -> dict[str, list[str]]:
        return {parameter: files for parameters, files in self.tensors.groups for parameter in parameters}

    def _groups(self) -> Iterator[dict[str, Tensor]]:
        """Values of parameters, those that share file tensors together."""
        group_of = {parameter: parameters for parameters, _ in self.tensors.groups for parameter in parameters}
        drawn: dict[str, Tensor] = {}
        with torch.no_grad():
            for unit in self._units:
                drawn |= self._draw(unit)
                for parameter in list(drawn):
                    group = group_of[parameter]
                    if parameter in drawn and all(other in drawn for other in group):
                        yield {other: drawn.pop(other) for other in group}
        assert not drawn, f"file tensors of {sorted(drawn)[:3]} are made of parameters that are not the model's"

    @cached_property
    def _units(self) -> list[Unit]:
        return [unit for unit in _units("", self.hf) if any(m._parameters for _, m in unit)]

    def _draw(self, unit: Unit) -> dict[str, Tensor]:
        """Values of a unit's parameters, by name; its modules let go of them."""
        empty = [(module, dict(module._parameters)) for _, module in unit]
        try:
            for module, parameters in empty:
                for key, parameter in parameters.items():
                    if parameter is not None:
                        unset = torch.full(parameter.shape, torch.nan)
                        module._parameters[key] = nn.Parameter(unset, requires_grad=False)
            with torch.random.fork_rng(devices=[]), torch.no_grad(), initialization.guard_torch_init_functions():
                torch.manual_seed(zlib.crc32(f"{self.seed} {unit[0][0]}".encode()))
                for path, module in reversed(unit):  # a parent may overwrite what its children were given
                    self._owner(path)._init_weights(module)
            found = {}
            for path, module in unit:
                for key, parameter in module.named_parameters(recurse=False):
                    full = f"{path}.{key}" if path else key
                    if full in self.names:
                        found[full] = torch.zeros_like(parameter) if full in self.zeros else parameter.detach()
            return found
        finally:
            for module, parameters in empty:
                module._parameters.update(parameters)

    def _owner(self, path: str) -> PreTrainedModel:
        """The innermost library model around a module: its rules hold."""
        owner = self.hf
        module: nn.Module = self.hf
        for part in path.split(".") if path else ():
            module = getattr(module, part)
            if isinstance(module, PreTrainedModel):
                owner = module
        return owner


def _units(name: str, module: nn.Module) -> Iterator[Unit]:
    whole = list(module.named_modules(prefix=name))
    layers = sum(isinstance(inner, GradientCheckpointingLayer) for _, inner in whole)
    if layers == 0 or isinstance(module, GradientCheckpointingLayer):
        yield whole
        return
    for child, inner in module.named_children():
        yield from _units(f"{name}.{child}" if name else child, inner)
    yield [(name, module)]
