"""Chat messages as people's files hold them, made plain: role and text, tool calls kept, nothing empty passed on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Messages = list[dict[str, Any]]

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Who is who where a message says `from` and `value`."""


def is_conversation(value: Any) -> bool:
    """Whether a field's value is a list of chat messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def clean(value: Any, what: str) -> Messages:
    """The messages in `value`, each with `role` and a text `content`.

    `from`/`value` become role and content; parts of text become one text; fields that are null (as Parquet fills
    them in) are left out. Raises ValueError beginning with `what` for anything that a template would print as it
    stands: content that is null or not text, and parts that are no text.
    """
    if not is_conversation(value):
        raise ValueError(f"{what} must be a list of messages with role and content, got {str(value)[:80]!r}")
    return [_message(one, f"{what}, message {number}") for number, one in enumerate(value)]


def readable(prompt: str | Messages) -> str:
    """A prompt for people and rewards: its text, with roles where there are several messages."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def as_text(value: Any) -> str:
    """Text as it is, nothing as "", anything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def first_answer(messages: Sequence[dict[str, Any]]) -> int | None:
    """Index of the first assistant's message that answers a user's; None where there is none."""
    asked = False
    for index, message in enumerate(messages):
        if asked and message["role"] == "assistant":
            return index
        asked = asked or message["role"] != "system" and message["role"] != "assistant"
    return None


def last_answer(messages: Sequence[dict[str, Any]]) -> int | None:
    """Index of the last assistant's message that has something before it; None where there is none."""
    return next((index for index in range(len(messages) - 1, 0, -1) if messages[index]["role"] == "assistant"), None)


def without_nulls(value: Any) -> Any:
    """`value` without the fields that are null, at any depth."""
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def _message(message: dict[str, Any], what: str) -> dict[str, Any]:
    plain: dict[str, Any] = without_nulls(message)
    if "role" not in plain and "from" in plain:
        speaker = plain.pop("from")
        if speaker not in _SPEAKERS:
            raise ValueError(f"{what} is from {speaker!r}; it must be from one of {', '.join(_SPEAKERS)}")
        plain = {"role": _SPEAKERS[speaker], "content": plain.pop("value", None), **plain}
    if not isinstance(plain.get("role"), str):
        raise ValueError(f"{what} must have a role and content, got {str(message)[:80]!r}")
    content = plain.get("content")
    if content is None and plain.get("tool_calls"):
        content = ""
    return {**plain, "content": _text(content, what)}


def _text(content: Any, what: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        others = {str(part.get("type")) for part in content if not isinstance(part.get("text"), str)}
        if not others:
            return "".join(part["text"] for part in content)
        raise ValueError(f"{what} has a part of type {', '.join(sorted(others))}; only text is supported")
    raise ValueError(f"{what} has no text as its content, got {str(content)[:80]!r}")
