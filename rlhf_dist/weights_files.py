"""What the weight files of a model folder hold, from their headers alone: dtype and number of parameters."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_HEADER_LIMIT = 100 << 20
"""Bytes of the largest header that safetensors allows."""


@dataclass(frozen=True)
class StoredWeights:
    """Weights on disk."""

    dtype: str | None
    """Of most of them: float32, bfloat16, float16, or what the files call another; None where nothing says."""
    parameters: int | None
    """Numbers in all tensors, tied ones once; None where no safetensors file says."""


def stored_weights(path: str | Path) -> StoredWeights:
    """The weights in a model folder; where it has no safetensors files, what config.json says.

    Raises ValueError naming a file that was cut or is none of safetensors.
    """
    folder, sizes = Path(path).expanduser(), Counter[str]()
    for file in sorted(folder.glob("*.safetensors")):
        for tensor in _header(file).values():
            sizes[str(tensor["dtype"])] += math.prod(tensor["shape"])
    if sizes:
        most = sizes.most_common(1)[0][0]
        return StoredWeights(_NAMES.get(most, most), sizes.total())
    return StoredWeights(_configured(folder), None)


def export_dtype(path: str | Path, asked: str | None, computed: str) -> str:
    """The dtype that a model trained from the folder `path` is exported in.

    `asked` where it is set, else that of the folder's weights; `computed`, the engine's, where these are quantised
    or nobody says.
    """
    if asked is not None:
        return asked
    dtype = stored_weights(path).dtype
    return dtype if dtype in ("float32", "bfloat16", "float16") else computed


def _header(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_HEADER_LIMIT, size):
                raise ValueError(f"its header says {length} bytes, the file has {size}")
            header: dict[str, Any] = json.loads(stream.read(length))
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        if 8 + length + end > size:
            raise ValueError(f"its tensors need {8 + length + end} bytes, it has {size}")
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is cut short or no safetensors file ({error}); copy it again") from error
    return tensors


def _configured(folder: Path) -> str | None:
    file = folder / "config.json"
    if not file.is_file():
        return None
    settings = json.loads(file.read_text(encoding="utf-8"))
    found = settings.get("dtype") or settings.get("torch_dtype")
    return None if found is None else str(found)
