"""Attention over packed sequences: they lie one after the other in one long row, and none sees another.

    hidden  [1, N, H]   |  row 0  |  row 1  | prompt | response | response |  response  |
    spans               2 of 9 tokens         1 of 8   2 of 10 after the 8   1 of 12 after the 8

A prompt that several rows begin with is there once: their responses see it too, as if each came right after it.

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
class Span:
    """Neighbouring sequences of equal length."""

    count: int
    length: int
    """Tokens of each."""
    prefix: tuple[int, int] = (0, 0)
    """[start, end) of the earlier tokens that each of them sees besides its own; empty for none."""

    @property
    def keys(self) -> int:
        """Tokens that the last token of each sequence sees."""
        return self.prefix[1] - self.prefix[0] + self.length


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a pack lie."""

    spans: tuple[Span, ...]
    ends: Tensor
    """[sequences + 1] int32 on the device: 0 and the end of each sequence, in tokens."""
    key_ends: Tensor
    """[sequences + 1] int32: the same for the tokens that each sequence sees."""
    keys: Tensor | None
    """[K] int64, the tokens that each sequence sees, one sequence after the other; None where these are its own."""
    group: dist.ProcessGroup | None = None
    """Ranks that hold a piece of the tokens each; None where a rank holds them all."""

    @staticmethod
    def of(
        sequences: Sequence[tuple[int, tuple[int, int]]], device: torch.device, group: dist.ProcessGroup | None = None
    ) -> Packing:
        """The packing of sequences in this order: tokens of each (>= 1), and the prefix it sees too, as in `Span`."""
        spans: list[Span] = []
        for length, prefix in sequences:
            if spans and (spans[-1].length, spans[-1].prefix) == (length, prefix):
                spans[-1] = Span(spans[-1].count + 1, length, prefix)
            else:
                spans.append(Span(1, length, prefix))
        lengths = torch.tensor([length for length, _ in sequences])
        ends = F.pad(lengths.cumsum(0), (1, 0))
        key_lengths = lengths + torch.tensor([end - start for _, (start, end) in sequences])
        seen = None
        if any(span.keys > span.length for span in spans):
            starts = ends[:-1].tolist()
            parts = [
                torch.arange(*bounds)
                for start, (length, prefix) in zip(starts, sequences, strict=True)
                for bounds in (prefix, (start, start + length))
            ]
            seen = torch.cat(parts).to(device)
        key_ends = F.pad(key_lengths.cumsum(0), (1, 0))
        return Packing(tuple(spans), ends.to(device, torch.int32), key_ends.to(device, torch.int32), seen, group)

    @property
    def tokens(self) -> int:
        """Tokens of the pack."""
        return sum(span.count * span.length for span in self.spans)


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
    for span in packing.spans:
        part = slice(start, start + span.count * span.length)
        start = part.stop
        q = _sequences(query[0, :, part], span.count)
        k, v = (_after_prefix(tensor[0], part, span) for tensor in (key, value))
        windowed = sliding_window is not None and span.keys > sliding_window
        if not windowed and span.keys <= _SHORT and query.dtype == torch.bfloat16:
            attended = _short(q, k, v, scaling)
        else:
            plain = not windowed and span.keys == span.length
            seen = None if plain else _seen(span, sliding_window if windowed else None, query.device)
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, is_causal=plain, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


_SHORT = 256
"""Tokens up to which plain products beat torch's fused CPU kernel in bfloat16 (128 tokens: 21 ms against 59 ms)."""


def _short(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention with all scores at once: [n, Hq, L, D] from key and value [n, Hk, K, D], K - L of a prefix."""
    count, heads, length, size = query.shape
    keys = key.shape[2]
    together = query.reshape(count, key.shape[1], -1, size)
    scores = (together @ key.transpose(-1, -2)).view(count, heads, length, keys).float()
    ahead = torch.ones(length, keys, dtype=torch.bool, device=query.device).triu(1 + keys - length)
    weights = scores.mul_(scaling or size**-0.5).masked_fill_(ahead, -torch.inf).softmax(-1).to(query.dtype)
    return (weights.view(count, key.shape[1], -1, keys) @ value).view(count, heads, length, size)


def _sequences(tensor: Tensor, count: int) -> Tensor:
    """[heads, count * length, D] -> [count, heads, length, D], a view."""
    heads, tokens, size = tensor.shape
    return tensor.reshape(heads, count, tokens // count, size).transpose(0, 1)


def _after_prefix(states: Tensor, part: slice, span: Span) -> Tensor:
    """[heads, N, D] -> [count, heads, keys, D]: each sequence of the span behind what it shares."""
    own = _sequences(states[:, part], span.count)
    if span.keys == span.length:
        return own
    shared = states[:, slice(*span.prefix)].expand(span.count, -1, -1, -1)
    return torch.cat([shared, own], dim=2)


def _seen(span: Span, sliding_window: int | None, device: torch.device) -> Tensor:
    """[length, keys] bool, True where attended: token j of a sequence is at position keys - length + j."""
    ahead = span.keys - span.length
    seen = torch.ones(span.length, span.keys, dtype=torch.bool, device=device).tril(ahead)
    return seen if sliding_window is None else seen.triu(1 + ahead - sliding_window)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, sliding_window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if packing.keys is not None:
        # Fewer queries than keys: the kernel lines their ends up, which is what a prefix wants.
        k, v = k[packing.keys], v[packing.keys]
    attended = varlen_attn(
        q,
        k,
        v,
        packing.ends,
        packing.key_ends,
        max(span.length for span in packing.spans),
        max(span.keys for span in packing.spans),
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(attended, Tensor), "asked for no auxiliary outputs"
    return attended


AttentionInterface.register("packed", packed_attention)
