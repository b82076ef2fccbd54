"""One pack of tokens cut over several ranks: sequence parallelism, and the head's share under tensor parallelism.

    sp = 2, N tokens      rank 0: tokens 0 .. N/2 - 1        rank 1: tokens N/2 .. N - 1
    layers                each rank its own tokens; attention exchanges tokens for heads (Ulysses,
                          arXiv 2309.14509): [N/sp, heads] -> all-to-all -> [N, heads/sp] and back
    outputs               each rank those of its own tokens, then gathered: the loss sees whole rows on every rank

A loss computed on every rank of the group from gathered outputs is one loss, not `size` of them: the gradient of a
gather is the rank's own slice. What is computed from a piece of the tokens has the gradient of that piece; FSDP
sums it over `sp`, `summed_gradient` over `tp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TokenSplit:
    """Which piece of every pack this rank has."""

    sequence: int = 1
    """Ranks the tokens are cut over in the layers."""
    tensor: int = 1
    """Ranks that share the head's work on one piece of tokens."""
    rank: int = 0
    """Place in `group`: sequence-major."""
    sequence_group: dist.ProcessGroup | None = None
    tensor_group: dist.ProcessGroup | None = None
    group: dist.ProcessGroup | None = None
    """All sequence * tensor ranks that hold the same rows; None for one."""

    @property
    def size(self) -> int:
        """Ranks that hold the same rows."""
        return self.sequence * self.tensor


WHOLE = TokenSplit()
"""Every rank has all tokens of its rows."""


def gather_tokens(mine: Tensor, counts: tuple[int, ...], split: TokenSplit) -> Tensor:
    """[counts[rank], ...] of each rank of the group -> [sum(counts), ...] on all; differentiable."""
    if split.group is None:
        return mine
    gathered: Tensor = _Gather.apply(mine, counts, split)
    return gathered


def summed_gradient(tensor: Tensor, split: TokenSplit) -> Tensor:
    """`tensor` itself; its gradient is summed over the ranks that share the head's work."""
    if split.tensor_group is None:
        return tensor
    same: Tensor = _SummedGradient.apply(tensor, split.tensor_group)
    return same


def heads_for_tokens(states: Tensor, split_group: dist.ProcessGroup) -> Tensor:
    """[heads, N/sp, D] of all heads and this rank's tokens -> [heads/sp, N, D]; differentiable."""
    heads, tokens, size = states.shape
    ranks = dist.get_world_size(split_group)
    sent = states.reshape(ranks, heads // ranks, tokens, size).contiguous()
    received: Tensor = _AllToAll.apply(sent, split_group)
    return received.transpose(0, 1).reshape(heads // ranks, ranks * tokens, size)


def tokens_for_heads(states: Tensor, split_group: dist.ProcessGroup) -> Tensor:
    """[N, heads/sp, D] of all tokens and this rank's heads -> [N/sp, heads, D]; differentiable."""
    tokens, heads, size = states.shape
    ranks = dist.get_world_size(split_group)
    sent = states.reshape(ranks, tokens // ranks, heads, size).contiguous()
    received: Tensor = _AllToAll.apply(sent, split_group)
    return received.transpose(0, 1).reshape(tokens // ranks, ranks * heads, size)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, counts: tuple[int, ...], split: TokenSplit) -> Tensor:
        ctx.start, ctx.count = sum(counts[: split.rank]), counts[split.rank]
        # Equal sizes for the collective: the largest piece, the rest of the others is dropped again.
        padded = mine.new_zeros(max(counts), *mine.shape[1:])
        padded[: len(mine)] = mine
        received = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(received, padded, group=split.group)
        return torch.cat([piece[:count] for piece, count in zip(received, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0][ctx.start : ctx.start + ctx.count].contiguous(), None, None


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _AllToAll(torch.autograd.Function):
    """Block k of dim 0 goes to rank k of the group; it is its own reverse."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sent = grads[0].contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=ctx.group)
        return received, None
