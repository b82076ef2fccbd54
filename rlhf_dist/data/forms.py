"""Raw rows in the forms people have, as one: what is given, and what is to be said.

prompts       prompt: text or messages | a conversation, whose last answer is left out
examples      prompt and response | prompt and completion | a conversation (`messages`), one turn or many
preferences   prompt, chosen, rejected | chosen and rejected with the prompt inside, as text or messages
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from rlhf_dist.config import SourceConfig
from rlhf_dist.data.fields import CONVERSATIONS, MARGIN, Fields, value_of
from rlhf_dist.data.files import RawRow
from rlhf_dist.data.messages import Messages, as_text, clean, first_answer, is_conversation, last_answer, without_nulls


@dataclass(frozen=True, kw_only=True)
class Item:
    """One row of a source before it is tokenised. All text, or all chat messages."""

    prompt: str | Messages
    responses: tuple[str | Messages, ...] = ()
    """None for prompts, one for examples, chosen and rejected for preferences."""
    answer: str | None
    """None where the row has none."""
    margin: float = 0.0
    source: str | None = None
    """verl's `data_source`."""
    extra: RawRow
    """Fields that are none of the above."""
    tools: Any = None
    """JSON schemas of tools, for the chat template."""


def item_of(row: RawRow, fields: Fields, config: SourceConfig) -> Item:
    """The item that `row` holds. Raises ValueError for what it lacks, or has in another form than is needed."""
    prompt, responses = _FORMS[config.rows](row, fields, config)
    if not prompt:
        raise ValueError("the prompt is empty")
    chat = not isinstance(prompt, str)
    if chat and config.chat is False:
        raise ValueError("it has chat messages, but chat is false; leave chat unset")
    if not chat and (config.chat or config.system is not None):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, str):
        system: Messages = [{"role": "system", "content": config.system}] if config.system is not None else []
        prompt = [*system, *prompt]
        responses = tuple([{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in responses)
    answer, used = value_of(row, fields.answer), {*fields.names(), "data_source", "tools"}
    return Item(
        prompt=prompt,
        responses=responses,
        answer=None if answer is None else as_text(answer),
        margin=_number(row.get(MARGIN), MARGIN),
        source=row["data_source"] if isinstance(row.get("data_source"), str) else None,
        extra={name: value for name, value in row.items() if name not in used},
        tools=_tools(row.get("tools")),
    )


def _prompts(row: RawRow, fields: Fields, config: SourceConfig) -> tuple[str | Messages, tuple[()]]:
    assert fields.prompt is not None, "find_fields looks for it"
    prompt = _value(row, fields.prompt)
    if isinstance(prompt, str):
        return prompt, ()
    messages = clean(prompt, repr(fields.prompt))
    if messages[-1]["role"] != "assistant":
        return messages, ()
    if fields.prompt.rpartition(".")[2] not in CONVERSATIONS:
        raise ValueError(
            f"{fields.prompt!r} ends with what the assistant says, so the prompt would hold its answer; leave that "
            f"message out, or call the field {' or '.join(CONVERSATIONS)}: a conversation is cut before its last answer"
        )
    last = last_answer(messages)
    if last is None:
        raise ValueError(f"{fields.prompt!r} has no message before the assistant's")
    return messages[:last], ()


def _examples(row: RawRow, fields: Fields, config: SourceConfig) -> tuple[str | Messages, tuple[str | Messages, ...]]:
    assert fields.prompt is not None, "find_fields looks for it"
    if fields.conversation:
        prompt, response = _split(clean(_value(row, fields.prompt), repr(fields.prompt)), fields.prompt, config)
        return prompt, (response,)
    assert fields.response is not None, "find_fields looks for it"
    given, said = _value(row, fields.prompt), _value(row, fields.response)
    return _both(given, fields.prompt, ((said, fields.response),), config)


def _preferences(
    row: RawRow, fields: Fields, config: SourceConfig
) -> tuple[str | Messages, tuple[str | Messages, ...]]:
    assert fields.chosen is not None and fields.rejected is not None, "find_fields looks for them"
    said = tuple((_value(row, name), name) for name in (fields.chosen, fields.rejected))
    given = value_of(row, fields.prompt)
    if given is not None and fields.prompt is not None:
        return _both(given, fields.prompt, said, config)
    (chosen, name), (rejected, _) = said
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = common_beginning(chosen, rejected)
        if not prompt:
            raise ValueError(f"there is no prompt, and {name!r} and {fields.rejected!r} begin with different words")
        return prompt, (chosen[len(prompt) :], rejected[len(prompt) :])
    return _inside(said)


def _both(
    given: Any, name: str, said: tuple[tuple[Any, str], ...], config: SourceConfig
) -> tuple[str | Messages, tuple[str | Messages, ...]]:
    """A prompt and what is said after it, each text or messages."""
    if not isinstance(given, str):
        prompt = clean(given, repr(name))
        return prompt, tuple(_said(value, field, prompt) for value, field in said)
    talks = [clean(value, repr(field)) if is_conversation(value) else None for value, field in said]
    if any(talk is not None and talk[0]["role"] != "assistant" for talk in talks) and config.chat is not False:
        # A copy of the prompt stands beside conversations that begin with it.
        if len(said) == 1:
            assert talks[0] is not None, "it begins with another role"
            prompt, response = _split(talks[0], said[0][1], config)
            return prompt, (response,)
        whole = next(talk for talk in talks if talk is not None and talk[0]["role"] != "assistant")
        last = last_answer(whole)
        if last is None:
            raise ValueError(f"{said[0][1]!r} has no message of the assistant's")
        prompt = whole[:last]
        return prompt, tuple(_said(value, field, prompt) for value, field in said)
    if any(talk is not None for talk in talks) and config.chat is not False:
        prompt = [{"role": "user", "content": given}]
        return prompt, tuple(_said(value, field, prompt) for value, field in said)
    return given, tuple(_last_text(value, field) for value, field in said)


def _said(value: Any, name: str, prompt: Messages) -> str | Messages:
    """A response to `prompt`: text, or messages that may repeat the prompt before it."""
    if isinstance(value, str):
        return value
    messages = clean(value, repr(name))
    if messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if not messages or messages[0]["role"] != "assistant":
        raise ValueError(f"{name!r} must begin with the prompt or the assistant's message, got {str(messages)[:80]!r}")
    return messages


def _last_text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    messages = clean(value, repr(name))
    return str(messages[-1]["content"])


def _inside(said: tuple[tuple[Any, str], ...]) -> tuple[Messages, tuple[str | Messages, ...]]:
    """Conversations that begin alike: what they share is the prompt."""
    talks = [clean(value, repr(name)) for value, name in said]
    shared = 0
    while all(shared < len(talk) for talk in talks) and talks[0][shared] == talks[1][shared]:
        shared += 1
    while shared and not all(shared < len(talk) and talk[shared]["role"] == "assistant" for talk in talks):
        shared -= 1
    if not shared:
        names = " and ".join(repr(name) for _, name in said)
        raise ValueError(f"there is no prompt, and {names} share no messages before the assistant's")
    return talks[0][:shared], tuple(talk[shared:] for talk in talks)


def _split(messages: Messages, name: str, config: SourceConfig) -> tuple[Messages, Messages]:
    """A conversation as what is given and what is to be said, turns of others among it."""
    cut = last_answer(messages) if config.turns == "last" else first_answer(messages)
    if cut is None:
        raise ValueError(f"{name!r} has no answer of the assistant's to a message before it")
    rest = messages[cut:]
    return messages[:cut], rest


def common_beginning(one: str, other: str) -> str:
    """What two texts begin with, up to the end of a word; the white space behind it belongs to what follows."""
    end = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    inside = any(end < len(text) and not text[end].isspace() for text in (one, other)) and end > 0
    if inside and not one[end - 1].isspace():
        end = max((match.end() for match in re.finditer(r"\s", one[:end])), default=0)
    return one[:end].rstrip()


def _value(row: RawRow, name: str) -> Any:
    value = value_of(row, name)
    if value is None:
        raise ValueError(f"it has nothing under {name!r}, only {', '.join(row) or 'none'}")
    if not isinstance(value, (str, list)) or value == []:
        raise ValueError(f"{name!r} must be text or a list of messages, got {str(value)[:80]!r}")
    return value


def _tools(value: Any) -> Any:
    """JSON schemas of tools, given as a list or as the text of one; None for none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"'tools' is text, but not JSON: {error}") from error
    if value is not None and not isinstance(value, list):
        raise ValueError(f"'tools' must be a list of JSON schemas, got {str(value)[:80]!r}")
    return without_nulls(value) or None


def _number(value: Any, name: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name!r} must be a number, got {str(value)[:80]!r}")
    return float(value)


_FORMS = {"prompts": _prompts, "examples": _examples, "preferences": _preferences}
