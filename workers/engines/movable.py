"""Tensors that leave their device together and come back, into the same tensors.

    device   | storage 0 | storage 1 |   leave: bytes to the host buffer, storages emptied
    host     |  one buffer, allocated once (pinned beside CUDA)  |   come: storages filled again

A storage is emptied in place, so every tensor, view and optimizer state that lies in it goes and comes with it, whoever
made it: FSDP's flat shards, ZeRO's partitions, an engine's parameters. What was not written since it came need not be
copied again. On a CPU the same happens between two places in host memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Contents = Literal["it was", "zeros", "anything"]
CHUNK_BYTES = 64 << 20
"""Of a host buffer: torch's allocator of pinned memory rounds up to a power of two, and this is one."""


class Movable:
    """The storages of some tensors; those that torch cannot empty stay where they are, as `fixed_bytes`."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device, comes_as: Contents = "it was") -> None:
        """Tensors on other devices are left out. comes_as: what is in them afterwards; only `it was` takes host
        memory."""
        found: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.device == device:
                storage = local.detach().untyped_storage()
                found[storage._cdata] = storage
        self._storages = [storage for storage in found.values() if storage.resizable()]
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._comes_as, self._pinned = comes_as, device.type == "cuda"
        self._host: list[Tensor] | None = None
        self._saved = False
        """The host buffer has what the storages have, or had."""
        self.here = True
        self.nbytes = sum(self._sizes)
        """Bytes of what moves, wherever it is."""
        self.fixed_bytes = sum(storage.nbytes() for storage in found.values() if not storage.resizable())

    @property
    def held_bytes(self) -> int:
        """Bytes on the device now, as the storages say."""
        return sum(storage.nbytes() for storage in self._storages)

    def written(self) -> None:
        """Something has changed the contents: a copy from before is out of date."""
        self._saved = False

    @torch.no_grad()
    def leave(self, keep: bool = True) -> int:
        """Empty the storages; `keep` False: what they hold is not wanted back. Returns bytes copied."""
        if not self.here:
            return 0
        copied = 0
        if keep and self._comes_as == "it was" and not self._saved:
            self._host = self._host or _chunks(self.nbytes, self._pinned)
            for flat, host in self._pairs(self._host):
                host.copy_(flat, non_blocking=True)
            self._saved, copied = True, self.nbytes
        elif not keep:
            self._saved = False
        if self._pinned:  # a storage must not be given away before it is read
            torch.cuda.current_stream().synchronize()
        for storage in self._storages:
            storage.resize_(0)
        self.here = False
        return copied

    @torch.no_grad()
    def come(self) -> int:
        """Give the storages memory again, with their contents; with zeros where these were not kept. Returns bytes
        copied."""
        if self.here:
            return 0
        for storage, size in zip(self._storages, self._sizes, strict=True):
            storage.resize_(size)
        self.here = True
        if self._saved and self._host is not None:
            for flat, host in self._pairs(self._host):
                flat.copy_(host, non_blocking=True)
            return self.nbytes
        for storage in self._storages if self._comes_as != "anything" else ():
            _flat(storage).zero_()
        return 0

    def _pairs(self, host: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        """(bytes of a storage, the same bytes of the host buffer), none longer than a chunk."""
        at = 0
        for storage, size in zip(self._storages, self._sizes, strict=True):
            flat, begin = _flat(storage), 0
            while begin < size:
                chunk, inside = divmod(at, CHUNK_BYTES)
                length = min(size - begin, CHUNK_BYTES - inside)
                yield flat[begin : begin + length], host[chunk][inside : inside + length]
                begin, at = begin + length, at + length


def _chunks(nbytes: int, pinned: bool) -> list[Tensor]:
    sizes = [min(CHUNK_BYTES, nbytes - at) for at in range(0, nbytes, CHUNK_BYTES)]
    return [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]


def _flat(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
