"""Talks to tokens: ids of what is given and of what follows, and which of those are learnt.

What is given is tokenised by itself, as generation does. What follows is tokenised behind it, as one text, so that
nothing is put between the two; only where a token would lie across the border of an answer is it cut there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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
    if talk.spans == ((0, len(talk.follows)),):
        follows = whole[len(given) :] if behind else tokenizer.encode([talk.follows], special_tokens=False)[0]
        spans = [(0, len(follows))]
    else:
        places = tokenizer.places(talk.given + talk.follows, special_tokens=not talk.chat)[len(given) :]
        found = _token_spans(talk.spans, places, len(talk.given)) if behind else None
        follows, spans = _in_pieces(talk, tokenizer) if found is None else (whole[len(given) :], found)
    mask, stop = [0] * len(follows), 0
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


def _token_spans(spans: Sequence[Span], places: Sequence[Span], shift: int) -> list[Span] | None:
    """Tokens that each span of characters touches; None where one lies across the beginning of a span.

    places: characters of each token, counted from `shift` before the spans' own zero.
    """
    found = []
    for begin, end in ((begin + shift, end + shift) for begin, end in spans):
        inside = [k for k, (a, b) in enumerate(places) if a < end and b > begin]
        if inside and places[inside[0]][0] < begin:
            return None
        if inside:
            found.append((inside[0], inside[-1] + 1))
    return found


def _in_pieces(talk: Talk, tokenizer: TextTokenizer) -> tuple[list[int], list[Span]]:
    """Tokens of what follows, each answer tokenised from its own beginning on, as generation would begin it."""
    ids, spans = list[int](), list[Span]()
    cuts = [0, *(begin for begin, _ in talk.spans if begin), len(talk.follows)]
    for start, stop in pairwise(cuts):
        piece = talk.follows[start:stop]
        places = tokenizer.places(piece, special_tokens=False)
        inside = [(begin, end) for begin, end in talk.spans if start <= begin < stop]
        here = _token_spans(inside, places, -start)
        assert here is not None, "a piece begins where its answer does"
        spans += [(begin + len(ids), end + len(ids)) for begin, end in here]
        ids += tokenizer.encode([piece], special_tokens=False)[0]
    return ids, spans


def _end_of_answer(ids: Sequence[int], begin: int, end: int, tokenizer: TextTokenizer, ends: Ends) -> int:
    """Where an answer in tokens [begin, end) ends: behind its end of text, if only white space follows in it."""
    if end < len(ids) and ids[end] in ends.ids and (end == begin or ids[end - 1] not in ends.ids):
        return end + 1
    last = next((k for k in range(end - 1, begin - 1, -1) if ids[k] in ends.ids), None)
    if last is not None and not tokenizer.decode(ids[last + 1 : end]).strip():
        return last + 1
    return end
