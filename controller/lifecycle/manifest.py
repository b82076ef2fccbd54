"""The manifest of a checkpoint: what the controller knows of it, with the size and CRC-32 of every file, and its own.

    {"step": 40, "recipe": "ppo", "roles": ["actor", "critic"],
     "numbers": {"kl": {"coef": 0.2}},                    every State's
     "settings": {"actor.optimizer.lr": 1e-05, ...},      what decides what a step sees (decisive_settings.py)
     "sources": {"prompts": {"rows": 8, "shift": 0}},     step t has rows [8 t + shift, 8 t + shift + 8)
     "files": {"actor/shard-00001-....safetensors": [274792, 1234567], ...},
     "crc32": 305419896}                                  of all the rest, so that a changed number is found

It is written last and read first: a folder without one is no checkpoint, one whose manifest or files are not what was
written is a damaged one.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_dist.durable_files import crc_of

NAME = "manifest.json"
READERS = 8
"""Files read at one time: CRC-32 leaves the other threads running."""


class Damaged(ValueError):
    """A checkpoint is not what was written; the message says which file and how."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete checkpoint says of itself."""

    step: int
    """Steps done."""
    recipe: str
    roles: tuple[str, ...]
    numbers: Mapping[str, Mapping[str, float]]
    files: Mapping[str, tuple[int, int]]
    """Path inside the folder -> bytes and CRC-32."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Source parameter -> its rows a step, and what is added to step * rows for the first of a step."""

    def text(self) -> str:
        """The file's content."""
        content = json.loads(json.dumps(asdict(self)))
        return json.dumps({**content, "crc32": _crc(content)}, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a checkpoint's folder, which is called step_N. Raises Damaged."""
    try:
        content = (folder / NAME).read_bytes()
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read: {error.strerror}") from None
    return parse_manifest(content, folder.name)


def parse_manifest(text: bytes, folder: str) -> Manifest:
    """The manifest of the folder of this name. Raises Damaged."""
    try:
        content = json.loads(text)
        said = content.pop("crc32")
    except (ValueError, AttributeError, KeyError, TypeError):
        raise Damaged(f"{NAME} is empty, cut, or not a manifest") from None
    if _crc(content) != said:
        raise Damaged(f"{NAME} is not what was written (CRC-32 differs)")
    try:
        files = {name: (int(size), int(crc)) for name, (size, crc) in content.pop("files").items()}
        manifest = Manifest(files=files, roles=tuple(content.pop("roles")), **content)
    except (TypeError, KeyError, ValueError, AttributeError):
        raise Damaged(f"{NAME} is of another version of this program") from None
    if folder != f"step_{manifest.step}":
        raise Damaged(f"{NAME} is of step {manifest.step}, which is not the folder's")
    return manifest


def check_files(folder: Path, files: Mapping[str, tuple[int, int]], *, read: int | None) -> None:
    """Raises Damaged naming the first file that is missing, cut, or of another content than was written.

    read: files of up to so many bytes are read to compare their content; None: all, a few minutes for a terabyte.
    """
    for name, (size, _) in files.items():
        file = folder / name
        try:
            found = file.stat().st_size
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from None
        if found != size:
            raise Damaged(f"{name} has {found} bytes instead of {size}")
    compared = [name for name, (size, _) in files.items() if read is None or size <= read]
    with ThreadPoolExecutor(READERS, thread_name_prefix="crc") as threads:
        for name, same in zip(
            compared, threads.map(lambda name: _same(folder / name, files[name][1]), compared), strict=True
        ):
            if not same:
                raise Damaged(f"{name} is not what was written (CRC-32 differs)")


def _same(file: Path, crc: int) -> bool:
    try:
        return crc_of(file) == crc
    except OSError as error:
        raise Damaged(f"{file.name} cannot be read: {error.strerror}") from None


def _crc(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
