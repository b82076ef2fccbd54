"""Attention over packed sequences: they lie one after the other in one long row, and none sees another.

    hidden  [1, N, H]   |  row 0  |  row 1  | prompt | response | response |  response  |
    spans               2 of 9 tokens         1 of 8   2 of 10 after the 8   1 of 12 after the 8

What several rows begin with (a prompt, a stretch of a tree) is there once: what follows sees it too, as if it came
right after it.

No [N, N] mask is built. Rows are packed in order of length, so rows of equal length are neighbours and one
attention call over a view handles each span. On CUDA in half precision torch's variable-length flash attention
takes the whole pack in one call. Where ranks hold a piece of the tokens each, they exchange tokens for heads first.

Registered with transformers as the attention implementation `packed`. Its models make their masks through a registry
too; ours makes a `RowMask`: which rule the library would have used (causal, window, chunks), and the packing. Layers
pass it on to attention unseen, so what a family says about masks holds here whatever else it passes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from rlhf_dist.machine_settings import takes_packs
from workers.engines.model.attention_map import Watch, attention_of_last_tokens
from workers.engines.model.token_split import heads_for_tokens, tokens_for_heads

Prefix = tuple[tuple[int, int], ...]
"""[start, end) of tokens of the pack, in the order of the row: one stretch for a shared prompt, more along a tree."""


@dataclass(frozen=True)
class Span:
    """Neighbouring sequences of equal length."""

    count: int
    length: int
    """Tokens of each."""
    prefix: Prefix = ()
    """The earlier tokens that each of them sees besides its own."""

    @property
    def keys(self) -> int:
        """Tokens that the last token of each sequence sees."""
        return sum(end - start for start, end in self.prefix) + self.length


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
        sequences: Sequence[tuple[int, Prefix]], device: torch.device, group: dist.ProcessGroup | None = None
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
        key_lengths = lengths + torch.tensor([sum(end - start for start, end in prefix) for _, prefix in sequences])
        seen = None
        if any(span.keys > span.length for span in spans):
            starts = ends[:-1].tolist()
            parts = [
                torch.arange(*bounds)
                for start, (length, prefix) in zip(starts, sequences, strict=True)
                for bounds in (*prefix, (start, start + length))
            ]
            seen = torch.cat(parts).to(device)
        key_ends = F.pad(key_lengths.cumsum(0), (1, 0))
        return Packing(tuple(spans), ends.to(device, torch.int32), key_ends.to(device, torch.int32), seen, group)

    @property
    def tokens(self) -> int:
        """Tokens of the pack."""
        return sum(span.count * span.length for span in self.spans)

    @cached_property
    def by_row(self) -> tuple[Tensor, Tensor]:
        """[S, K] int64: the tokens that each sequence sees, its own last, padded on the right with any; and

        [N] int64: where each token of the pack, as its sequence's own, lies in the flattened first.
        """
        sequences = [(span.length, span.prefix, span.keys) for span in self.spans for _ in range(span.count)]
        longest = max(keys for *_, keys in sequences)
        tokens = np.zeros((len(sequences), longest), np.int64)
        own, start = [], 0
        for row, (length, prefix, keys) in enumerate(sequences):
            seen = [np.arange(*bounds) for bounds in (*prefix, (start, start + length))]
            tokens[row, :keys] = np.concatenate(seen)
            own.append(row * longest + np.arange(keys - length, keys))
            start += length
        device = self.ends.device
        return torch.from_numpy(tokens).to(device), torch.from_numpy(np.concatenate(own)).to(device)


MaskRule = Callable[[int, int, Tensor | int, Tensor | int], Any]
"""(row, head, position of the query, position of the key) -> seen?, as transformers writes masks."""


@dataclass(frozen=True)
class RowMask:
    """Which tokens of its own row each token sees; what the library's layers are given as their attention mask."""

    packing: Packing
    rule: MaskRule
    """Over positions within a row, from 0."""
    local: int | None = None
    """Keys up to which the rule is plain causal attention; None: at any number, 0: at none."""
    window: int | None = None
    """The rule is causal attention to this many tokens, the token's own included."""

    def plain(self, span: Span) -> bool:
        """Within this span the rule is causal attention."""
        return self.local is None or span.keys <= self.local

    def seen(self, span: Span, device: torch.device) -> Tensor:
        """[length, keys] bool, True where attended: token j of a sequence is at position keys - length + j."""
        keys = torch.arange(span.keys, device=device)
        queries = keys[span.keys - span.length :, None]
        seen: Tensor = self.rule(0, 0, queries, keys[None])
        return seen.expand(span.length, span.keys)


def causal(packing: Packing, window: int | None = None) -> RowMask:
    """Causal attention to `window` tokens, the token's own included; None for all before it."""
    if window is None:
        return RowMask(packing, causal_mask_function)
    return RowMask(packing, lambda _, __, query, key: (key <= query) & (key > query - window), window, window)


@dataclass(frozen=True)
class Pass:
    """A forward pass over a pack that is going on."""

    packing: Packing
    windows: set[int]
    """Local attention that masks or layers have asked for so far, in tokens."""
    softcaps: set[float]
    """Caps on scores that layers have asked for so far."""
    watch: Watch | None = None
    """What of a layer's attention is asked for beside its result."""


_running: list[Pass] = []


@contextmanager
def running(packing: Packing, watch: Watch | None = None) -> Iterator[Pass]:
    """Masks that models make inside are of this packing; models make theirs before the first layer."""
    _running.append(Pass(packing, set(), set(), watch))
    try:
        yield _running[-1]
    finally:
        _running.pop()


def _row_mask(*, mask_function: MaskRule, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> RowMask:
    """The library's mask of one forward pass; `mask_function` is its rule for a row alone."""
    packing = _running[-1].packing
    if mask_function is causal_mask_function:
        return RowMask(packing, mask_function)
    if local_size is None or use_vmap:  # a rule of the model's own
        return RowMask(packing, mask_function, 0)
    _running[-1].windows.add(local_size)
    # A window sees `local_size` tokens back from every token; chunks begin anew at their edges.
    query, keys = torch.tensor([[local_size]]), torch.tensor([[0, 1]])
    sliding = mask_function(0, 0, query, keys).tolist() == [[False, True]]
    return RowMask(packing, mask_function, local_size, local_size if sliding else None)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RowMask | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each sequence of the pack, as transformers calls it.

    query [1, Hq, n, D], key [1, Hk, n, D] and value [1, Hk, n, Dv] with Hq a multiple of Hk -> [1, n, Hq, Dv]; n is
    the rank's piece of the N tokens. attention_mask: what `_row_mask` made; for a model that makes none, causal
    attention over `packing` to `sliding_window` tokens. softcap c: scores become c tanh(score / c). s_aux [Hq]: a score
    that takes part in the softmax and adds nothing (a sink). Raises ValueError for a mask that is the model's own.
    """
    mask = attention_mask
    if mask is None and packing is not None:
        mask = causal(packing, sliding_window)
        if _running and sliding_window is not None:
            _running[-1].windows.add(sliding_window)
    if not isinstance(mask, RowMask):
        raise ValueError(f"{type(module).__name__} makes attention masks of its own, which do not know about packs")
    if _running and softcap is not None:
        _running[-1].softcaps.add(softcap)
    watch = _running[-1].watch if _running else None
    if watch is not None and getattr(module, "layer_idx", None) == watch.layer:
        watch.found = attention_of_last_tokens(watch, query, key, mask, scaling, softcap, s_aux)
    group = mask.packing.group
    if group is not None:
        if s_aux is not None:
            s_aux = s_aux.tensor_split(dist.get_world_size(group))[dist.get_rank(group)]
        query, key, value = (heads_for_tokens(t[0], group).unsqueeze(0) for t in (query, key, value))
    whole = (
        takes_packs(query.device.type, str(query.dtype).removeprefix("torch.")) and value.shape[-1] == query.shape[-1]
    )
    if whole and softcap is None and s_aux is None and mask.local == mask.window:
        attended = _flash(query, key, value, mask.packing, scaling, mask.window)
    else:
        attended = _by_span(query, key, value, mask, scaling, softcap, s_aux)
    if group is not None:
        attended = tokens_for_heads(attended, group)
    return attended.unsqueeze(0), None


def _by_span(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: RowMask,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[N, Hq, Dv]."""
    outputs, start = [], 0
    for span in mask.packing.spans:
        part = slice(start, start + span.count * span.length)
        start = part.stop
        q = _sequences(query[0, :, part], span.count)
        k, v = (_after_prefix(tensor[0], part, span) for tensor in (key, value))
        plain = mask.plain(span)
        short = plain and span.keys <= _SHORT and query.dtype == torch.bfloat16
        if short or softcap is not None or sinks is not None:
            attended = _explicit(q, k, v, mask.seen(span, query.device), scaling, softcap, sinks)
        else:
            causal = plain and span.keys == span.length
            seen = None if causal else mask.seen(span, query.device)
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


_SHORT = 256
"""Tokens up to which plain products beat torch's fused CPU kernel in bfloat16 (128 tokens: 21 ms against 59 ms)."""


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[n, Hq, L, Dv] with all scores at once, from key [n, Hk, K, D] and value [n, Hk, K, Dv]; seen [L, K]."""
    count, heads, length, size = query.shape
    kv_heads, keys = key.shape[1:3]
    together = query.reshape(count, kv_heads, -1, size)
    scores = (together @ key.transpose(-1, -2)).view(count, heads, length, keys).float()
    scores.mul_(size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill_(~seen, -torch.inf)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        column = sinks.float().view(1, heads, 1, 1).expand(count, heads, length, 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    attended = weights.to(value.dtype).reshape(count, kv_heads, -1, keys) @ value
    return attended.view(count, heads, length, -1)


def _sequences(tensor: Tensor, count: int) -> Tensor:
    """[heads, count * length, D] -> [count, heads, length, D], a view."""
    heads, tokens, size = tensor.shape
    return tensor.reshape(heads, count, tokens // count, size).transpose(0, 1)


def _after_prefix(states: Tensor, part: slice, span: Span) -> Tensor:
    """[heads, N, D] -> [count, heads, keys, D]: each sequence of the span behind what it shares."""
    own = _sequences(states[:, part], span.count)
    if span.keys == span.length:
        return own
    shared = torch.cat([states[:, slice(*bounds)] for bounds in span.prefix], dim=1).expand(span.count, -1, -1, -1)
    return torch.cat([shared, own], dim=2)


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
AttentionMaskInterface.register("packed", _row_mask)
