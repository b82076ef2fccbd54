"""Heads of a role's own, beside the one that its model comes with: where they start, and the file that they are in.

    in memory            head_quality.weight  [K, H], a module of `RoleModel` beside `hf`
    in a model folder    heads.safetensors    quality [K, H], float32, beside the model's own files

Engines shard, train and checkpoint them with the other parameters; they belong to no file of the model itself, so
they are not in `layout("merged")` and no generation engine is sent them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

FILE = "heads.safetensors"
_PREFIX = "head_"
_WEIGHT = ".weight"


def head_module(name: str) -> str:
    """What a head's module is called in its `RoleModel`."""
    return f"{_PREFIX}{name}"


def is_head(parameter: str) -> bool:
    """Whether a parameter, by its name in memory, is one of these heads."""
    return parameter.startswith(_PREFIX) and parameter.count(".") == 1


def head_name(parameter: str) -> str:
    """Which head a parameter is the weight of."""
    return parameter.removeprefix(_PREFIX).removesuffix(_WEIGHT)


def width_of(hf: PreTrainedModel) -> int:
    """H, of a model's last states."""
    layer: Any = getattr(hf, "score", None) or hf.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    return int(hf.config.get_text_config().hidden_size if weight is None else weight.shape[1])


def start_heads(module: Any, folder: Path | None, seed: int, trained: bool, dtype: torch.dtype) -> None:
    """Give the heads of a `RoleModel` their values: those of the folder's file, else random ones of their scale.

    dtype: of the model's other parameters. The same on every rank. Raises ValueError for a head of another size in the
    file.
    """
    saved = read_heads(folder) if folder is not None else {}
    for name, head in module.own_heads.items():
        layer: nn.Linear = getattr(module, head_module(name))
        if name in saved and saved[name].shape != layer.weight.shape:
            raise ValueError(
                f"{folder}/{FILE} has head {name} of shape {list(saved[name].shape)}, the role declares "
                f"{list(layer.weight.shape)}; declare it as it was trained, or under another name"
            )
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        drawn = torch.randn(layer.weight.shape, generator=generator) * head.scale
        values = saved.get(name, drawn).float()
        module.heads_at_start[name] = values
        layer.weight = nn.Parameter(values.to(dtype), requires_grad=trained)


def read_heads(folder: Path) -> dict[str, Tensor]:
    """Head -> [K, H] of a model folder; empty for one without."""
    file = folder / FILE
    if not file.is_file():
        return {}
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping


def write_heads(folder: Path, heads: Mapping[str, Tensor]) -> None:
    """Write whole weights, by head, beside a model; nothing for none."""
    if heads:
        shapes = json.dumps({name: list(weight.shape) for name, weight in heads.items()})
        tensors = {name: weight.float().cpu().contiguous() for name, weight in heads.items()}
        save_file(tensors, folder / FILE, {"format": "pt", "heads": shapes})
