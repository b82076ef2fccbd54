"""Where each token of a response ends in its text, for what is said about parts of the text."""

from __future__ import annotations

from os.path import commonprefix
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import FunctionConfig
from rlhf_dist.wire import Call, WorkerContext

_HALF = "�"
"""What a part of a character is decoded as."""


class SpellerWorker:
    """Implements `rlhf_dist.roles.Speller` on a CPU process."""

    def __init__(self, context: WorkerContext, config: FunctionConfig) -> None:
        self._context = context
        self._tokenizers: dict[str, Any] = {}

    def spell(self, batch: Batch, call: Call, *, of: str) -> Batch:
        """The ends of all tokens. Raises ValueError for a role without a tokenizer."""
        if of not in self._tokenizers:
            from transformers import AutoTokenizer

            known = self._context.tokenizers
            if of not in known:
                raise ValueError(f"spell(of={of!r}) must name a role with a model, one of {', '.join(sorted(known))}")
            self._tokenizers[of] = AutoTokenizer.from_pretrained(known[of], trust_remote_code=False)
        ends = [text_ends(self._tokenizers[of], row.tolist()) for row in batch["response_ids"].rows()]
        return Batch({"text_ends": Column.ragged(ends, dtype=np.int32)}, batch.num_rows)


def text_ends(tokenizer: Any, ids: list[int]) -> list[int]:
    """Characters of the decoded text, special tokens left out, that are there after each token. A character of several
    tokens is there after its last."""

    def decode(part: list[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=True))

    whole = decode(ids)
    ends, begin, read, done = list[int](), 0, 0, 0
    for at in range(1, len(ids) + 1):
        # What a token adds may depend on the one before it (a space), not on what lies further back.
        before, now = decode(ids[begin:read]), decode(ids[begin:at])
        if not now.endswith(_HALF):
            done += len(now) - len(before)
            begin, read = read, at
        ends.append(done)
    if done == len(whole):
        return ends
    # A tokenizer that looks further, or a response that ends within a character: every beginning by itself.
    return [len(commonprefix([decode(ids[:at]), whole])) for at in range(1, len(ids) + 1)]
