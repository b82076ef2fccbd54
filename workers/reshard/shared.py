"""Chunk buffers that two processes on one device both see: nothing travels but a word that a chunk is ready.

    sender      fill chunk ──"ready"──> receiver copies out of the same memory ──"taken"──> sender fills it again

On a GPU through CUDA IPC, where NCCL cannot connect two processes of one device; on a CPU through an unnamed memory
file, which goes with its last user however that ends.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing import reductions

HANDLE_BYTES = 4096
"""What a handle is padded to, so that its receiver knows how much to expect."""


def device_identity(device: torch.device) -> str:
    """Equal for processes that can share buffers."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass
class SharedBuffer:
    """A buffer of the sender's and what its receivers open it with; it lives as long as this does."""

    tensor: Tensor
    """[elements]"""
    handle: bytes
    _file: int = -1

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


def new_buffer(elements: int, dtype: torch.dtype, device: torch.device) -> SharedBuffer:
    """A buffer others can open."""
    if device.type == "cuda":
        tensor = torch.empty(elements, dtype=dtype, device=device)
        return SharedBuffer(tensor, _padded(pickle.dumps(reductions.reduce_tensor(tensor))))
    file = os.memfd_create("reshard")
    nbytes = elements * dtype.itemsize
    os.ftruncate(file, nbytes)
    path = f"/proc/{os.getpid()}/fd/{file}"
    return SharedBuffer(_mapped(path, nbytes, dtype), _padded(pickle.dumps((path, nbytes, dtype))), file)


def open_buffer(handle: bytes, device: torch.device) -> Tensor:
    """The same memory in another process. Raises RuntimeError where it cannot be reached."""
    opened = pickle.loads(handle)
    if device.type == "cuda":
        rebuild, arguments = opened
        tensor: Tensor = rebuild(*arguments)
        return tensor
    return _mapped(*opened)


def settle(device: torch.device) -> None:
    """Wait until what was queued on the device is done, so that another process may look."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _mapped(path: str, nbytes: int, dtype: torch.dtype) -> Tensor:
    storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=nbytes)
    return torch.empty(0, dtype=dtype).set_(storage, 0, (nbytes // dtype.itemsize,))


def _padded(data: bytes) -> bytes:
    assert len(data) <= HANDLE_BYTES, f"a handle takes {len(data)} bytes, more than {HANDLE_BYTES}"
    return data.ljust(HANDLE_BYTES, b"\0")
