"""Files that outlive a power cut: written beside and moved, flushed to the disk with their folder; checksums."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path

PIECE_BYTES = 16 << 20
"""Read at once for a checksum."""


def crc_of(file: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    total = 0
    with file.open("rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            total = zlib.crc32(piece, total)
    return total


def sync(paths: Iterable[Path]) -> None:
    """Flush files and folders to the disk: a file's content, and of a folder the names in it."""
    for path in paths:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_durably(file: Path, text: str) -> None:
    """Write `text`, UTF-8: the file is there whole or, after a crash at any moment, as it was before."""
    beside = file.with_name(f".{file.name}.partial")
    beside.write_text(text, encoding="utf-8")
    sync([beside])
    beside.replace(file)
    sync([file.parent])
