"""Messages over a pipe: a length, then JSON."""

from __future__ import annotations

import json
import os
from typing import Any

LENGTH_BYTES = 4


def write_frame(descriptor: int, message: Any) -> None:
    """Blocks until all of it is written. Raises OSError if nobody reads."""
    text = json.dumps(message).encode()
    left = memoryview(len(text).to_bytes(LENGTH_BYTES, "big") + text)
    while left:
        left = left[os.write(descriptor, left) :]


def read_frame(descriptor: int) -> Any:
    """The next message; None at the end. Not a byte more is read: another process may read the next one."""
    head = _exactly(descriptor, LENGTH_BYTES)
    text = None if head is None else _exactly(descriptor, int.from_bytes(head, "big"))
    return None if text is None else json.loads(text)


def _exactly(descriptor: int, count: int) -> bytes | None:
    parts = []
    while count:
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
