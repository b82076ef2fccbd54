"""What several rows of a pass begin with, once: prompts, and stretches that the leaves of a tree share.

    rows       p p p a a b b        pack     p p p a a | b b | c c c | d d d d
               p p p a a c c c      seen                 ^ behind p p p a a, as c c c is
               p p p d d d d                                          d d d d behind p p p alone

Rows are put in order of their tokens, where neighbours have the longest common beginnings; each beginning that is worth
it is a sequence of its own, which what follows sees. Causal models give equal tokens behind equal tokens equal states,
so that nothing has to be known of how rows came about.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf_dist.batch import Batch, IntArray
from workers.engines.model.attention import Prefix

LEAST_SHARED = 16
"""Tokens behind the prompt that are worth a sequence of their own: each one is a call of attention."""


@dataclass(frozen=True)
class Places:
    """Where the rows of a pack lie."""

    tokens: IntArray
    """[all tokens of the rows, one row after the other] the place of each; several may have the same."""
    sequences: list[tuple[int, Prefix]]
    """Of the pack, in order: tokens, and what it sees before them."""
    padding: int = 0
    """Tokens of the pack that are no row's."""


def shared_places(batch: Batch) -> Places:
    """Rows of a pass with what they begin with laid out once; those that share nothing first, in their order."""
    prompts, responses = batch["prompt_ids"].rows(), batch["response_ids"].rows()
    rows = [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)]
    spelled = [row.astype(">i4").tobytes() for row in rows]  # in the order of bytes, which is that of ids
    order = sorted(range(len(rows)), key=lambda row: (spelled[row], row))
    common = [_common(rows[one], rows[other]) for one, other in zip(order, order[1:], strict=False)]
    found: list[list[IntArray]] = [[] for _ in rows]
    sequences: list[tuple[int, Prefix]] = []
    at = 0

    def lay(length: int, prefix: Prefix, owners: list[int]) -> tuple[int, int]:
        nonlocal at
        sequences.append((length, prefix))
        for row in owners:
            found[row].append(np.arange(at, at + length))
        at += length
        return at - length, at

    todo: list[tuple[int, int, int, Prefix]] = [(0, len(rows), 0, ())]  # from, to, tokens laid out, where
    while todo:
        low, high, done, prefix = todo.pop()
        inside = common[low : high - 1]
        shortest = min(inside, default=0)
        members = order[low:high]
        prompt = min(len(prompts[row]) for row in members)
        worth = max(done, prompt if shortest >= prompt else 0)  # a prompt is shared however short it is
        if shortest - worth >= LEAST_SHARED:
            worth = shortest
        if len(members) > 1 and worth > done:
            prefix = (*prefix, lay(worth - done, prefix, members))
            done = worth
        cuts = [low, *(low + k + 1 for k, length in enumerate(inside) if length == shortest), high]
        parts = [(one, other) for one, other in zip(cuts, cuts[1:], strict=False) if other > one]
        for row in sorted(order[one] for one, other in parts if other - one == 1):
            if len(rows[row]) > done:
                lay(len(rows[row]) - done, prefix, [row])
        todo += [(one, other, done, prefix) for one, other in reversed(parts) if other - one > 1]
    return Places(np.concatenate([part for row in found for part in row]), sequences)


def _common(one: IntArray, other: IntArray) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
