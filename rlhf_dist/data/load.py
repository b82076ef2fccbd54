"""A part of a source, tokenised: columns of every usable row, and the counts of what was left out or is missing."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.data.encode import Encoded, encode_talks, encode_texts
from rlhf_dist.data.ends import Ends
from rlhf_dist.data.forms import Item, item_of
from rlhf_dist.data.messages import readable
from rlhf_dist.data.own_fields import own_column
from rlhf_dist.data.read import Part, read
from rlhf_dist.data.tokenizer import TextTokenizer
from rlhf_dist.data.turns import Talk, given_text, talks_of

CHUNK = 2000
"""Rows that exist as Python objects at one time."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What rows must keep to."""

    prompt_tokens: int
    """Longer prompts are left out."""
    response_tokens: int = 0
    """Longer given responses are cut, their end-of-text token included; 0 for no limit."""
    exclude: Collection[str] = ()
    """Prompts (the `prompt` column) that are left out."""


@dataclass
class Counts:
    """Rows of a part (pairs, for preferences)."""

    rows: int = 0
    """Rows read."""
    heldout: int = 0
    """Left out because their prompt is excluded."""
    too_long: int = 0
    """Left out because of the prompt's length."""
    cut: int = 0
    """Responses cut."""
    without_answer: int = 0
    """Usable rows that have no ground truth."""
    equal: int = 0
    """Usable pairs whose two responses are the same tokens, as they are emitted: no loss on pairs learns from them."""
    shortest_prompt: int | None = None
    """Tokens, too long or not."""
    longest_prompt: int = 0
    longest_response: int = 0
    """Tokens before it was cut."""

    def add(self, other: Counts) -> None:
        """Count `other`'s rows too."""
        for name in ("rows", "heldout", "too_long", "cut", "without_answer", "equal"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        shortest = [one.shortest_prompt for one in (self, other) if one.shortest_prompt is not None]
        self.shortest_prompt = min(shortest, default=None)
        self.longest_prompt = max(self.longest_prompt, other.longest_prompt)
        self.longest_response = max(self.longest_response, other.longest_response)


@dataclass(kw_only=True)
class Loaded:
    """A part, ready to be emitted."""

    part: Part
    items: Batch | None = None
    """Usable rows, `rows_per_item` for each item, with the column `place`: where it was read; None for no rows."""
    counts: Counts = field(default_factory=Counts)
    chat: bool = False
    """Some row is chat messages under the template."""


def load(
    part: Part,
    seed: int,
    tokenizer: TextTokenizer,
    ends: Ends,
    limits: Limits,
    first: int | None = None,
    fields: Mapping[str, str] = MappingProxyType({}),
) -> Loaded:
    """Read and tokenise a part, or its `first` rows; `fields`: columns of their own (`Prompts.fields`).

    Raises ValueError naming file and row of what is wrong.
    """
    raw, loaded, chunks = read(part.config, seed, first), Loaded(part=part), list[Batch]()
    while placed := list(islice(raw.rows, CHUNK)):
        talked = []
        for place, row in placed:
            try:
                item = item_of(row, raw.fields, part.config)
                if readable(item.prompt) in limits.exclude:
                    loaded.counts.heldout += 1
                    continue
                talked.append(_Talked(place, item, talks_of(item, tokenizer) or [_nothing_said(item, tokenizer)]))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        loaded.counts.rows += len(placed)
        chunk = _tokenised(talked, tokenizer, ends, limits, loaded)
        if chunk:
            chunks.append(_columns(chunk, part, limits, loaded.counts, fields))
    loaded.items = Batch.concat(chunks) if chunks else None
    return loaded


@dataclass(frozen=True)
class _Talked:
    place: str
    item: Item
    talks: list[Talk]


@dataclass(frozen=True)
class _Row:
    place: str
    item: Item
    encoded: list[Encoded]


def _nothing_said(item: Item, tokenizer: TextTokenizer) -> Talk:
    return Talk(given_text(item, tokenizer), "", (), chat=not isinstance(item.prompt, str))


def _tokenised(
    talked: Sequence[_Talked], tokenizer: TextTokenizer, ends: Ends, limits: Limits, loaded: Loaded
) -> list[_Row]:
    """Rows whose prompt is short enough."""
    flat, counts = [talk for one in talked for talk in one.talks], loaded.counts
    if loaded.part.config.rows == "prompts":
        ids = encode_texts([talk.given for talk in flat], [talk.chat for talk in flat], tokenizer)
        encoded = [Encoded(given, [], []) for given in ids]
    else:
        encoded = encode_talks(flat, tokenizer, ends)
    rows, left = [], iter(encoded)
    for one in talked:
        mine = list(islice(left, len(one.talks)))
        shortest, longest = (pick(len(each.given) for each in mine) for pick in (min, max))
        if not shortest:
            raise ValueError(f"{one.place}: the prompt has no tokens")
        counts.shortest_prompt = min(shortest, counts.shortest_prompt or shortest)
        counts.longest_prompt = max(counts.longest_prompt, longest)
        loaded.chat = loaded.chat or one.talks[0].chat
        if longest > limits.prompt_tokens:
            counts.too_long += 1
            continue
        rows.append(_Row(one.place, one.item, mine))
    return rows


def _columns(rows: Sequence[_Row], part: Part, limits: Limits, counts: Counts, fields: Mapping[str, str]) -> Batch:
    kind, flat = part.config.rows, [each for row in rows for each in row.encoded]
    counts.without_answer += sum(row.item.answer is None for row in rows)
    texts = {
        "place": [row.place for row in rows],
        "prompt": [readable(row.item.prompt) for row in rows],
        "answer": [row.item.answer or "" for row in rows],
        "source": [row.item.source or part.name for row in rows],
        "fields": [json.dumps(row.item.extra, default=str) for row in rows],
    }
    once = Batch(
        {
            **{name: Column.strings(values) for name, values in texts.items()},
            **{
                name: own_column(name, what, [(row.place, row.item.extra) for row in rows])
                for name, what in fields.items()
            },
        }
    )
    columns = {
        "prompt_ids": Column.ragged([each.given for each in flat], dtype=np.int32),
        **once.repeat(part.config.rows_per_item),
    }
    if kind != "prompts":
        limit = limits.response_tokens or None
        counts.cut += sum(len(each.follows) > limit for each in flat) if limit else 0
        counts.longest_response = max(counts.longest_response, *(len(each.follows) for each in flat))
        columns["response_ids"] = Column.ragged([each.follows[:limit] for each in flat], dtype=np.int32)
        columns["response_mask"] = Column.ragged([each.mask[:limit] for each in flat], dtype=np.uint8)
    if kind == "preferences":
        limit = limits.response_tokens or None
        counts.equal += sum(row.encoded[0].follows[:limit] == row.encoded[1].follows[:limit] for row in rows)
        columns["label"] = Column(np.tile(np.array([1, -1], dtype=np.int8), len(rows)))
        columns["margin"] = Column(np.repeat(np.array([row.item.margin for row in rows], dtype=np.float32), 2))
    return Batch(columns)
