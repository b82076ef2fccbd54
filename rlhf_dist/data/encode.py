"""Talks to tokens: ids of what is given and of what follows, and which of those are learnt.

What is given is tokenised by itself, as generation does. What follows is tokenised behind it, as one text, so that
nothing is put between the two; only where a token would lie across the border is it tokenised by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_dist.data.ends import Ends
from rlhf_dist.data.template import Span
from rlhf_dist.data.tokenizer import TextTokenizer
from rlhf_dist.data.turns import Talk


@dataclass(frozen=True)
class Encoded:
    """One sequence as tokens."""

    given: list[int]
    follows: list[int]
    """Ends with an end-of-text token; nothing comes behind what is learnt."""
    mask: list[int]
    """1 where a token of `follows` is learnt."""


def encode_texts(texts: Sequence[str], chats: Sequence[bool], tokenizer: TextTokenizer) -> list[list[int]]:
    """Ids of prompts; a rendered template (`chats`) brings its own special tokens."""
    encoded: list[list[int]] = [[] for _ in texts]
    for chat in (False, True):
        which = [index for index, is_chat in enumerate(chats) if is_chat == chat]
        ids_of = tokenizer.encode([texts[index] for index in which], special_tokens=not chat)
        for index, ids in zip(which, ids_of, strict=True):
            encoded[index] = ids
    return encoded


def encode_talks(talks: Sequence[Talk], tokenizer: TextTokenizer, ends: Ends) -> list[Encoded]:
    """Tokens of each talk, every answer with its end.

    An end of text that stands behind an answer belongs to it, whether or not the template counts it in; white space
    behind that does not. A last answer without an end gets one. Raises ValueError if there is no end to give.
    """
    chats = [talk.chat for talk in talks]
    given = encode_texts([talk.given for talk in talks], chats, tokenizer)
    whole = encode_texts([talk.given + talk.follows for talk in talks], chats, tokenizer)
    return [
        _encoded(talk, before, both, tokenizer, ends) for talk, before, both in zip(talks, given, whole, strict=True)
    ]


def _encoded(talk: Talk, given: list[int], whole: list[int], tokenizer: TextTokenizer, ends: Ends) -> Encoded:
    behind = whole[: len(given)] == given
    follows = whole[len(given) :] if behind else tokenizer.encode([talk.follows], special_tokens=False)[0]
    if talk.spans == ((0, len(talk.follows)),):
        spans = [(0, len(follows))]
    else:
        spans = _token_spans(talk, len(given) if behind else None, tokenizer)
    mask = [0] * len(follows)
    stop = 0
    for begin, end in spans:
        stop = _end_of_answer(follows, begin, end, tokenizer, ends)
        mask[begin:stop] = [1] * (stop - begin)
    follows, mask = follows[:stop], mask[:stop]
    if not follows or follows[-1] not in ends.ids:
        if ends.appended is None:
            raise ValueError(
                f"nothing in {tokenizer.folder} names an end of text (eos_token, eos_token_id), which ends every answer"
            )
        follows, mask = [*follows, ends.appended], [*mask, 1]
    return Encoded(given, follows, mask)


def _token_spans(talk: Talk, skip: int | None, tokenizer: TextTokenizer) -> list[Span]:
    """Tokens of `follows` that each span of characters touches. skip: tokens of `given` before them in one text."""
    if skip is None:
        places, shift = tokenizer.places(talk.follows, special_tokens=False), 0
    else:
        places = tokenizer.places(talk.given + talk.follows, special_tokens=not talk.chat)[skip:]
        shift = len(talk.given)
    spans = []
    for begin, end in talk.spans:
        inside = [k for k, (a, b) in enumerate(places) if a < end + shift and b > begin + shift]
        if inside:
            spans.append((inside[0], inside[-1] + 1))
    return spans


def _end_of_answer(ids: Sequence[int], begin: int, end: int, tokenizer: TextTokenizer, ends: Ends) -> int:
    """Where an answer in tokens [begin, end) ends: behind its end of text, if only white space follows in it."""
    if end < len(ids) and ids[end] in ends.ids and (end == begin or ids[end - 1] not in ends.ids):
        return end + 1
    last = next((k for k in range(end - 1, begin - 1, -1) if ids[k] in ends.ids), None)
    if last is not None and not tokenizer.decode(ids[last + 1 : end]).strip():
        return last + 1
    return end
