"""A model folder that says of itself what a model will that is not trained yet: all that a check reads, no weights.

start/  config.json  tokenizer.json  model.safetensors          what a role starts from
  |
folder/ config.json  tokenizer.json  model.safetensors          links to the same files
        score.safetensors (one row)                             where the role has a value head
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from rlhf_dist.model_folder import HEAD, weight_names

ADDED = "to_come.safetensors"


def write_model_to_come(folder: Path, start: Path, *, value_head: bool) -> None:
    """Make `folder` look as the export of a role that is trained from the model folder `start`.

    value_head: it will be a sequence classifier with one label. Raises OSError or ValueError where `start` cannot be
    read.
    """
    folder.mkdir(parents=True)
    for file in start.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    settings = json.loads((start / "config.json").read_text())
    if value_head:
        settings |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (folder / "config.json").write_text(json.dumps(settings))
    names = weight_names(start)
    if value_head and HEAD not in names:
        # Who checks a head looks for its name.
        _write_tensors(folder / ADDED, {HEAD: {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}, bytes(4))
    elif not names:
        _write_tensors(folder / ADDED, {}, b"")  # The start is drawn at random and has no weights; its export will.


def _write_tensors(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
