"""Items as texts: what the model is given, what follows, and which characters of it the assistant says.

    given                      user: hi  assistant:
    follows                                          Hello.<end> user: and?  assistant: Well.<end>
    spans of the assistant                           ===========                        ==========

The text given is the one that generation is given: the chat template up to where the answer begins.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_dist.data.forms import Item
from rlhf_dist.data.messages import Messages
from rlhf_dist.data.template import Span
from rlhf_dist.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Talk:
    """One sequence as text."""

    given: str
    follows: str
    spans: tuple[Span, ...]
    """Characters of `follows` that are to be learnt, in order."""
    chat: bool
    """Rendered by a chat template, which brings its own special tokens."""


def given_text(item: Item, tokenizer: TextTokenizer) -> str:
    """The prompt as text. Raises ValueError where the chat template refuses it."""
    if isinstance(item.prompt, str):
        return item.prompt
    return tokenizer.render(item.prompt, tools=item.tools)


def talks_of(item: Item, tokenizer: TextTokenizer) -> list[Talk]:
    """One talk for each response of the item. Raises ValueError where turns cannot be told apart."""
    given = given_text(item, tokenizer)
    talks = []
    for response in item.responses:
        if isinstance(response, str):
            talks.append(Talk(given, response, ((0, len(response)),), chat=False))
        else:
            assert not isinstance(item.prompt, str), "messages follow messages"
            talks.append(_conversation(item.prompt, response, given, tokenizer, item))
    return talks


def _conversation(prompt: Messages, said: Messages, given: str, tokenizer: TextTokenizer, item: Item) -> Talk:
    whole, blocks = tokenizer.render_spans([*prompt, *said], tools=item.tools)
    if blocks:
        return _of_blocks(item, whole, blocks, given, tokenizer)
    answers = [index for index, message in enumerate(said) if message["role"] == "assistant"]
    spans = []
    for index in answers:
        before = tokenizer.render([*prompt, *said[:index]], tools=item.tools) if index else given
        upto, last = [*prompt, *said[: index + 1]], index + 1 == len(said)
        after = whole if last else tokenizer.render(upto, generation_prompt=False, tools=item.tools)
        if not (whole.startswith(before) and whole.startswith(after) and len(before) <= len(after)):
            return _alone(said, given, tokenizer)
        spans.append((len(before) - len(given), len(after) - len(given)))
    return Talk(given, whole[len(given) :], tuple(spans), chat=True)


def _of_blocks(item: Item, whole: str, blocks: list[Span], given: str, tokenizer: TextTokenizer) -> Talk:
    """The template says itself what the assistant says; what the prompt holds of that is not learnt."""
    assert not isinstance(item.prompt, str), "blocks come of messages"
    answered = any(message["role"] == "assistant" for message in item.prompt)
    spans = blocks[len(tokenizer.render_spans(item.prompt, tools=item.tools)[1]) if answered else 0 :]
    if not spans:
        raise ValueError(f"the chat template of {tokenizer.folder} has generation blocks, but none for this answer")
    if not whole.startswith(given) or len(given) > spans[0][0]:
        given = whole[: spans[0][0]]
    cut = len(given)
    return Talk(given, whole[cut:], tuple((a - cut, b - cut) for a, b in spans), chat=True)


def _alone(said: Messages, given: str, tokenizer: TextTokenizer) -> Talk:
    """A template that renders a message otherwise once more follow it (thoughts that are taken out, say)."""
    if len(said) > 1 or said[0].keys() - {"role", "content"}:
        raise ValueError(
            f"the chat template of {tokenizer.folder} writes earlier turns otherwise once others follow, so that what "
            "the assistant says cannot be told apart; mark it with {% generation %} blocks in the template, or train "
            "the last turn of a conversation only (turns=last)"
        )
    text = str(said[0]["content"])
    return Talk(given, text, ((0, len(text)),), chat=True)
