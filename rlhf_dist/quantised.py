"""Model folders whose weights are quantised: found by a field, a file beside it, or the dtype of most bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_QUANTISED_BY = ("quantization_config", "compression_config", "quantization")
"""Fields of config.json that say how weights were quantised: transformers', compressed-tensors' old one, MLX's."""
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files beside config.json that say it instead: GPTQ's, AWQ's, ModelOpt's."""
_NUMBERS = ("F64", "F32", "F16", "BF16")
_DEQUANTISE = (
    "which are neither trained nor computed with here; give the model in bfloat16 or float32 (transformers' "
    "model.dequantize() makes one where the method has it)"
)


def quantised(folder: Path, settings: Mapping[str, Any]) -> str:
    """How the weights of a model folder are quantised, and what to do, said of the folder; empty where they are not.

    Methods differ in what they scale, pack and permute; none is a set of numbers that can be trained, cut into boxes
    and sent. settings: its config.json.
    """
    for where, part in (("", settings), ("text_config.", settings.get("text_config"))):
        for field in _QUANTISED_BY:
            found = part.get(field) if isinstance(part, Mapping) else None
            if found:
                method = found.get("quant_method") or _any_method(found) if isinstance(found, Mapping) else found
                return f"holds weights quantised by {method} ({where}{field} in config.json), {_DEQUANTISE}"
    for name in _QUANTISED_FILES:
        if (folder / name).is_file():
            return f"holds quantised weights (it has {name}), {_DEQUANTISE}"
    kinds = weight_dtypes(folder)
    packed = sum(size for kind, size in kinds.items() if kind not in _NUMBERS)
    if packed > sum(kinds.values()) / 2:
        most = max(kinds, key=lambda kind: kinds[kind])
        return f"holds weights that are mostly {most} (in its safetensors files), {_DEQUANTISE}"
    return ""


def _any_method(found: Mapping[str, Any]) -> str:
    """A method that does not say its name: bitsandbytes once did not, others name a format."""
    return next((str(found[name]) for name in ("quant_algo", "format", "quant_type") if name in found), "some method")


def weight_dtypes(folder: Path) -> dict[str, int]:
    """safetensors' word for a dtype -> bytes of tensors that have it; files that cannot be read count nothing."""
    found: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        with (
            suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError),
            file.open("rb") as s,
        ):
            header = json.loads(s.read(min(int.from_bytes(s.read(8), "little"), file.stat().st_size)))
            for name, tensor in header.items():
                if name != "__metadata__":
                    start, end = tensor["data_offsets"]
                    found[tensor["dtype"]] = found.get(tensor["dtype"], 0) + end - start
    return found
