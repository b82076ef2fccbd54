"""Attention over packed sequences: rows lie one after the other in one long row, and none sees another.

    hidden  [1, N, H]   |  row 0  |  row 1  |   row 2    |   row 3    |
    spans               (count 2, length 9)  (count 2, length 12)

No [N, N] mask is built. Rows are packed in order of length, so rows of equal length are neighbours and one
attention call over a view handles each span. On CUDA in half precision torch's variable-length flash attention
takes the whole pack in one call. Where ranks hold a piece of the tokens each, they exchange tokens for heads first.

Registered with transformers as the attention implementation `packed`, which it passes `packing` to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from workers.engines.token_split import heads_for_tokens, tokens_for_heads


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a pack lie."""

    spans: tuple[tuple[int, int], ...]
    """(count, length) of neighbouring sequences of equal length, in order."""
    ends: Tensor
    """[sequences + 1] int32 on the device: 0 and the end of each sequence, in tokens."""
    group: dist.ProcessGroup | None = None
    """Ranks that hold a piece of the tokens each; None where a rank holds them all."""

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device, group: dist.ProcessGroup | None = None) -> Packing:
        """The packing of sequences of these lengths (tokens, each >= 1) in this order."""
        spans: list[tuple[int, int]] = []
        for length in lengths:
            if spans and spans[-1][1] == length:
                spans[-1] = (spans[-1][0] + 1, length)
            else:
                spans.append((1, length))
        ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(device, torch.int32)
        return Packing(tuple(spans), ends, group)

    @property
    def tokens(self) -> int:
        """Tokens of the pack."""
        return sum(count * length for count, length in self.spans)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(length for _, length in self.spans)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of the pack, as transformers calls it.

    query [1, Hq, n, D], key and value [1, Hk, n, D] with Hq a multiple of Hk -> [1, n, Hq, D]; n is the rank's piece
    of the N tokens. Raises ValueError for attention variants that it does not compute.
    """
    if attention_mask is not None or softcap is not None or s_aux is not None:
        raise ValueError(f"packed attention has no masks, soft caps or sinks, which {type(module).__name__} asks for")
    if packing.group is not None:
        query, key, value = (heads_for_tokens(t[0], packing.group).unsqueeze(0) for t in (query, key, value))
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        attended = _flash(query, key, value, packing, scaling, sliding_window)
    else:
        attended = _sdpa(query, key, value, packing, scaling, sliding_window)
    if packing.group is not None:
        attended = tokens_for_heads(attended, packing.group)
    return attended.unsqueeze(0), None


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, sliding_window: int | None
) -> Tensor:
    """[N, Hq, D]."""
    outputs, start = [], 0
    for count, length in packing.spans:
        part = slice(start, start + count * length)
        start = part.stop
        q, k, v = (_sequences(t[0, :, part], count) for t in (query, key, value))
        window = _window_mask(length, sliding_window, query.device)
        if window is None and length <= _SHORT and query.dtype == torch.bfloat16:
            attended = _short(q, k, v, scaling)
        else:
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=window, is_causal=window is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


_SHORT = 256
"""Tokens up to which plain products beat torch's fused CPU kernel in bfloat16 (128 tokens: 21 ms against 59 ms)."""


def _short(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention with all scores at once: [n, Hq, L, D] from key and value [n, Hk, L, D]."""
    count, heads, length, size = query.shape
    together = query.reshape(count, key.shape[1], -1, size)
    scores = (together @ key.transpose(-1, -2)).view(count, heads, length, length).float()
    ahead = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    weights = scores.mul_(scaling or size**-0.5).masked_fill_(ahead, -torch.inf).softmax(-1).to(query.dtype)
    return (weights.view(count, key.shape[1], -1, length) @ value).view(count, heads, length, size)


def _sequences(tensor: Tensor, count: int) -> Tensor:
    """[heads, count * length, D] -> [count, heads, length, D], a view."""
    heads, tokens, size = tensor.shape
    return tensor.reshape(heads, count, tokens // count, size).transpose(0, 1)


def _window_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """[length, length] bool, True where attended; None where the window covers the whole sequence."""
    if sliding_window is None or length <= sliding_window:
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    return seen.tril().triu(1 - sliding_window)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, sliding_window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    attended = varlen_attn(
        q,
        k,
        v,
        packing.ends,
        packing.ends,
        packing.longest,
        packing.longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(attended, Tensor), "asked for no auxiliary outputs"
    return attended


AttentionInterface.register("packed", packed_attention)
