"""How full a device is, in physical bytes: what the driver says, since not everything on it is torch's.

vLLM's sleep unmaps memory behind torch's allocator, and communicators, graphs and contexts never were in it.
A CPU has no such count of what is "on the device": there the storages themselves are asked.
"""

from __future__ import annotations

import torch

FRAGMENTS = 0.05
"""Share of a device that no tensor fits into."""


class Meter:
    """Of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"

    def capacity(self) -> int | None:
        """Bytes that may be used; None where nothing limits them."""
        if not self._cuda:
            return None
        return int(torch.cuda.mem_get_info(self._device)[1] * (1.0 - FRAGMENTS))

    def used(self, held: int) -> int:
        """Bytes in use. held: bytes of all storages that are known of."""
        if not self._cuda:
            return held
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def begin(self) -> None:
        """A phase begins."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)

    def working(self) -> int:
        """Most bytes that torch has had since `begin` beside what it has now."""
        if not self._cuda:
            return 0
        return torch.cuda.max_memory_allocated(self._device) - torch.cuda.memory_allocated(self._device)

    def settle(self) -> None:
        """What was given back is free for others from here on, and what was copied is there."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
