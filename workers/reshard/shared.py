"""Host memory that two processes of one machine both see: nothing travels but words of where a chunk lies.

An unnamed memory file, which goes with its last user however that ends.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

Handle = tuple[int, int, int]
"""(process, file descriptor in it, bytes) of a buffer."""


class SharedBuffer:
    """A buffer that others can open; it lives as long as this does."""

    def __init__(self, nbytes: int) -> None:
        self._file = os.memfd_create("reshard")
        size = max(nbytes, 1)  # an empty file cannot be mapped
        os.ftruncate(self._file, size)
        self.handle: Handle = (os.getpid(), self._file, size)
        self.tensor = open_buffer(self.handle)[:nbytes]
        """[nbytes] uint8"""

    def __del__(self) -> None:
        os.close(self._file)


def open_buffer(handle: Handle) -> Tensor:
    """The same memory in another process of this machine. Raises RuntimeError where it cannot be reached."""
    process, file, nbytes = handle
    storage = torch.UntypedStorage.from_file(f"/proc/{process}/fd/{file}", shared=True, nbytes=nbytes)
    memory: Tensor = torch.empty(0, dtype=torch.uint8)
    return memory.set_(storage, 0, (nbytes,))  # type: ignore[call-overload, no-any-return]
