"""What the last token of each row attends to in the last layer: one row of its attention map, not the map.

    q of the last token [heads, D]  x  k of all that it sees [keys, D]  ->  softmax, mean over heads, of the response

It is computed beside the layer's own attention, from the same queries and keys: memory of one row of scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from workers.engines.model.attention import RowMask


@dataclass
class Watch:
    """What to look for in a pass over a pack, and what was found."""

    layer: int
    """Index of the layer, as the library counts."""
    last_token: Tensor
    """[B] int64, position of each row's last token in the pack."""
    response_tokens: Tensor
    """[B] int64; a response ends with the last token."""
    found: Tensor | None = None
    """[T] float32: the share of attention that each response token has; all that a row's last token sees has 1."""


def attention_of_last_tokens(
    watch: Watch,
    query: Tensor,
    key: Tensor,
    mask: RowMask,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[T] of query [1, Hq, N, D] and key [1, Hk, N, D]; see `Watch.found`. The arguments are `packed_attention`'s."""
    size = query.shape[-1]
    together = query.shape[1] // key.shape[1]
    ends = mask.packing.ends.tolist()
    starts, prefixes = ends[:-1], [span.prefix for span in mask.packing.spans for _ in range(span.count)]
    sequence = torch.bucketize(watch.last_token, mask.packing.ends[1:], right=True).tolist()
    found = []
    for at, row, length in zip(sequence, watch.last_token.tolist(), watch.response_tokens.tolist(), strict=True):
        # A padded row's sequence goes on behind its last token, which does not see that.
        seen = [*(slice(*bounds) for bounds in prefixes[at]), slice(starts[at], row + 1)]
        keys = torch.cat([key[0, :, part] for part in seen], dim=1).repeat_interleave(together, dim=0)
        scores = (keys.float() @ query[0, :, row, :, None].float()).squeeze(-1)
        scores = scores * (size**-0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        places = torch.arange(scores.shape[1], device=scores.device)
        allowed = torch.as_tensor(mask.rule(0, 0, places[-1:], places), device=scores.device)
        scores = scores.masked_fill(~allowed.expand(scores.shape), -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.float()[:, None]], dim=1)
        shares = scores.softmax(-1).mean(0)[: len(places)]
        found.append(shares[len(shares) - length :])
    return torch.cat(found)
