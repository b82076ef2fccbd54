"""What one rank holds of a role that learns, as bytes that another process can keep: no file, no collective.

A rank of the same pool, built anew, takes them as they are: the same rank of as many has the same parts.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_dist.failure import FailureKind
from workers.engines.files.checkpoint import State
from workers.engines.files.weight_set import local_parts

Bytes = NDArray[np.uint8]


class BrokenCopy(RuntimeError):
    """A copy in memory that is not what was copied, or of another role or number of ranks."""

    failure_kind = FailureKind.DATA


@dataclass(frozen=True, kw_only=True)
class RankState:
    """A copy of this rank's parts of a state."""

    version: int
    sets: Mapping[str, Mapping[str, Any]]
    """Named sets, as in a checkpoint's card."""
    parts: Mapping[str, tuple[Bytes, ...]]
    """Tensor of the state -> the parts this rank has of it."""
    crc: int
    """CRC-32 over all parts, in order."""

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return sum(part.nbytes for parts in self.parts.values() for part in parts)


def copied(state: State, version: int, sets: Mapping[str, Mapping[str, Any]]) -> RankState:
    """A copy of `state` in host memory."""
    parts = {
        key: tuple(_bytes(part.detach().cpu()).copy() for part in local_parts(tensor)) for key, tensor in state.items()
    }
    return RankState(version=version, sets=sets, parts=parts, crc=_crc(parts))


@torch.no_grad()
def put_back(copy: RankState, state: State) -> None:
    """Overwrite every tensor of `state` with its copy. Raises BrokenCopy."""
    if copy.parts.keys() != state.keys():
        differ = sorted(copy.parts.keys() ^ state.keys())
        raise BrokenCopy(f"the copy in memory is of another state: {differ[0]} is in one of them only")
    if _crc(copy.parts) != copy.crc:
        raise BrokenCopy("the copy in memory is not what was copied (CRC-32 differs)")
    for key, tensor in state.items():
        for mine, kept in zip(local_parts(tensor), copy.parts[key], strict=True):
            if mine.numel() * mine.element_size() != kept.nbytes:
                raise BrokenCopy(f"the copy in memory has {kept.nbytes} bytes of {key}, this rank has {mine.nbytes}")
            flat = torch.from_numpy(kept.copy() if not kept.flags.writeable else kept)
            mine.copy_(flat.view(mine.dtype).reshape(mine.shape))


def _bytes(tensor: torch.Tensor) -> Bytes:
    raw: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw


def _crc(parts: Mapping[str, tuple[Bytes, ...]]) -> int:
    total = 0
    for each in parts.values():
        for part in each:
            total = zlib.crc32(part.data, total)
    return total
