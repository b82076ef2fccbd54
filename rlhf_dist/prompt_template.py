"""A Template: columns of a batch as a prompt for a language model, sent by value from the user's file, as losses are.

    Template("Question: {prompt}\nAnswer: {response}\nIs it right? End with yes or no.", system="You grade answers.")

    row {prompt, response}  -- fields put in -->  messages  -- the role's own chat template -->  prompt_ids

A field is a column's name: a text, one number a row (`{rewards:.2f}`), or token ids (`{response_ids}`), which are
decoded by the tokenizer that made them. Braces of the text itself are doubled, as in `str.format`.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]
"""With `role` and `content`."""


@dataclass(frozen=True)
class Template:
    """How one row is asked about."""

    user: str
    """What the user says."""
    system: str = ""
    """The system message; empty for none."""
    answer: str = ""
    """How the answer begins; the model goes on from there. A parser sees it in front of what was drawn."""
    chat: bool | None = None
    """Apply the chat template. None: where the tokenizer has one; else the system text stands above the user's."""

    template_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, e.g. {"enable_thinking": False}."""

    def __post_init__(self) -> None:
        if not self.user:
            raise ValueError("Template needs a text for the user to say, got an empty one")
        for text in (self.user, self.system, self.answer):
            _fields(text)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns it reads, each once."""
        return tuple(dict.fromkeys(name for text in (self.user, self.system, self.answer) for name in _fields(text)))

    @property
    def bare(self) -> tuple[Messages, str]:
        """As `messages`, with nothing in the place of its fields."""
        user, system, answer = (
            "".join(literal for literal, _, _, _ in string.Formatter().parse(text))
            for text in (self.user, self.system, self.answer)
        )
        return _messages(user, system), answer

    def messages(self, row: Mapping[str, Any]) -> tuple[Messages, str]:
        """The messages for the values of one row, and how the answer begins.

        Raises ValueError where a value does not take its format, naming column and value.
        """
        user, system, answer = (_filled(text, row) for text in (self.user, self.system, self.answer))
        return _messages(user, system), answer


def _messages(user: str, system: str) -> Messages:
    given: Messages = [{"role": "system", "content": system}] if system else []
    return [*given, {"role": "user", "content": user}]


def _fields(text: str) -> list[str]:
    """Names of the fields in a text. Raises ValueError for what is no column's name."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"Template has a brace that opens or closes no field in {_short(text)} ({error}); double the braces of the "
            "text itself: {{ and }}"
        ) from error
    for name in names:
        if not name.isidentifier():
            raise ValueError(
                f"Template has the field {{{name}}} in {_short(text)}, and a field is a column's name, such as "
                "{prompt}; double the braces of the text itself: {{ and }}"
            )
    return names


def _filled(text: str, row: Mapping[str, Any]) -> str:
    parts = []
    for literal, name, form, conversion in string.Formatter().parse(text):
        parts.append(literal)
        if name is not None:
            value = row[name]
            try:
                plain = value if isinstance(value, str) else value.item()
                # A float32 column's 0.7 is 0.699999988079071 as a Python number.
                form = form or ("g" if isinstance(plain, float) else "")
                parts.append(repr(plain) if conversion == "r" else format(plain, form))
            except (AttributeError, ValueError, TypeError) as error:
                raise ValueError(
                    f"Template cannot write column {name!r} as {{{name}{':' + form if form else ''}}}: a field is a "
                    f"text, one number a row, or token ids, got {_short(str(value))} ({error})"
                ) from error
    return "".join(parts)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
