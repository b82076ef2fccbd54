"""What is said of parts of a response's text, as rewards of the tokens that spell them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult, host_op
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.transforms.columns import mask_and_offsets


def _reads(settings: Mapping[str, Any]) -> tuple[str, ...]:
    return ("response", "response_mask", "text_ends", *settings.get("spans", ()))


@host_op(reads=_reads, writes=("token_rewards",))
def span_rewards(batch: Batch, *, spans: Mapping[str, float], separator: str = "\n") -> HostResult:
    """Each token's reward: the sum of the values of the spans that it spells a part of.

    spans: column of text -> value; each text names parts of the response, with `separator` between them. A part stands
    for the first place where it is found, letter for letter; one that is not found has no token (`spans_not_found`).
    Needs `text_ends`, which `Speller.spell` writes. A token that does not count has no reward.
    """
    if not spans:
        raise ValueError('span_rewards needs columns with parts of responses: spans={"good": 1.0, "bad": -1.0}')
    mask, offsets = mask_and_offsets(batch)
    rewards = np.zeros(len(mask), np.float32)
    said = lost = 0
    for name, value in spans.items():
        for row, text in enumerate(batch[name].rows()):
            response, ends = batch["response"].row(row), batch["text_ends"].row(row)
            begins = np.append(0, ends[:-1]) if len(ends) else ends
            for part in filter(None, map(str.strip, text.split(separator))):
                said += 1
                at = response.find(part)
                if at < 0:
                    lost += 1
                    continue
                inside = (begins < at + len(part)) & (ends > at) & (ends > begins)
                rewards[offsets[row] + np.flatnonzero(inside)] += value
    rewards *= mask > 0
    metrics: Metrics = {
        "spans_not_found": Mean(float(lost), float(max(said, 1))),
        "marked_tokens": Mean(float((rewards != 0).sum()), float(max(len(rewards), 1))),
    }
    return HostResult(columns=Batch({"token_rewards": Column(rewards, offsets)}, batch.num_rows), metrics=metrics)
