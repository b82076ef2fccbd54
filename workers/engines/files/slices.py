"""Weights from a model folder, a slice at a time: no rank ever holds the model, in host memory or on its device.

    parameters_on_meta()   the model's modules, with parameters that have shapes and no memory (buffers are real)
    FolderWeights.open     the folder's tensors, where they are those that the model's files would have
    fill                   of each file tensor the boxes that this rank holds, straight from the mapped file

A rank has its shards and one slice on the way. Ranks of a node read one copy of the file: the page cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_dist.reshard.file_tensors import FileTensors
from rlhf_dist.reshard.layout import Layout
from rlhf_dist.reshard.shards import Shards

FLOATS = ("BF16", "F16", "F32", "F64")
"""Dtypes of weights in safetensors files that are the numbers themselves."""


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are made inside have parameters on the meta device; what they keep as buffers is computed."""
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def allocate(module: nn.Module, device: torch.device) -> None:
    """Give parameters on meta memory (not values) on `device`. FSDP keeps tied ones tied; plain ones are tied again
    with the library's `tie_weights`."""
    module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.device.type == "meta" else tensor)


class ReadWhole(ValueError):
    """A folder that is not read in slices; the text says why."""


@dataclass(frozen=True)
class FolderWeights:
    """The tensors of a model folder, by the names that the model's files have."""

    files: Mapping[str, Path]
    names: Mapping[str, str]
    """File tensor -> its name in this folder, where the base model was saved alone or with its head."""
    shapes: Mapping[str, tuple[int, ...]]
    absent: frozenset[str]
    """File tensors that the folder lacks: those of `may_lack`."""

    @classmethod
    def open(
        cls, folder: Path, hf: PreTrainedModel, tensors: FileTensors, may_lack: frozenset[str] = frozenset()
    ) -> FolderWeights:
        """Raises ReadWhole where the folder has other tensors: an older form, which transformers converts as it reads
        all of it; ValueError for weights that are quantised, whatever config.json says."""
        found: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        for file in _files_of(folder):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    tensor = opened.get_slice(name)
                    found[name], shapes[name], dtypes[name] = file, tuple(tensor.get_shape()), tensor.get_dtype()
        prefix = f"{hf.base_model_prefix}."
        names: dict[str, str] = {}
        for name, wanted in tensors.items():
            known = next((n for n in (name, name.removeprefix(prefix), f"{prefix}{name}") if n in found), None)
            if known is None:
                if name not in may_lack:
                    raise ReadWhole(f"its files have no {name}")
                continue
            if dtypes[known] not in FLOATS:
                raise ValueError(
                    f"{found[known]} holds {known} as {dtypes[known]}, and weights are read as {', '.join(FLOATS)}; "
                    "give the model in bfloat16 or float32"
                )
            if shapes[known] != wanted.shape:
                raise ReadWhole(f"its files have {known} of shape {list(shapes[known])}, not {list(wanted.shape)}")
            names[name] = known
        return cls(found, names, shapes, frozenset(may_lack - names.keys()))

    @property
    def unused(self) -> set[str]:
        """Tensors of the folder that the model does not have."""
        return set(self.files) - set(self.names.values())

    def fill(self, layout: Layout, shards: Shards, rank: int) -> None:
        """Write this rank's boxes of every file tensor; zeros where the folder has none.

        layout: of file tensors; shards: this rank's boxes of them, in the layout's order.
        """
        with torch.no_grad(), ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for name, parameter in layout.parameters.items():
                boxes = np.flatnonzero(parameter.rank == rank)
                for box, shard in zip(boxes, shards[name], strict=True):
                    if name in self.absent:
                        shard.zero_()
                        continue
                    source = self._slice(name, opened, stack)
                    edges = tuple(slice(int(a), int(b)) for a, b in parameter.box(int(box)))
                    shard.copy_(source[edges] if edges else source[...])

    def whole(self, name: str) -> Tensor:
        """One file tensor."""
        with ExitStack() as stack:
            return self._slice(name, {}, stack)[...]  # type: ignore[no-any-return]

    def fill_whole(self, tensors: FileTensors, parameters: Mapping[str, Tensor]) -> None:
        """Write whole parameters, one file tensor at a time."""
        with torch.no_grad(), ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for name in tensors:
                if name in self.absent:
                    for part in tensors[name].parts:
                        parameters[part.parameter].zero_()
                    continue
                tensors.write(name, self._slice(name, opened, stack)[...], parameters)

    def _slice(self, name: str, opened: dict[Path, Any], stack: ExitStack) -> Any:
        known = self.names[name]
        file = self.files[known]
        if file not in opened:
            opened[file] = stack.enter_context(safe_open(file, "pt"))
        return opened[file].get_slice(known)


def _files_of(folder: Path) -> list[Path]:
    """The files that transformers reads, whatever lies beside them: the one, else those that the index lists."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise ReadWhole("it has neither model.safetensors nor an index of its files")
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
