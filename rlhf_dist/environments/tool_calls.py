"""Tool calls in a model's text, and what cannot be read in it: parsers that an environment keeps.

    JsonCalls()   <tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>    Qwen, Hermes
    TextCalls()   <code>print(1)</code>               the text itself is the argument; any marks may stand around it

Several calls in one turn come in their order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rlhf_dist.environments.outcomes import PolicyError


@dataclass(frozen=True)
class ToolCall:
    """One call."""

    name: str
    arguments: Mapping[str, Any]


class ToolParser(Protocol):
    """Finds the calls in a turn."""

    def calls(self, text: str) -> list[ToolCall]:
        """The calls, none where the text has none. Raises PolicyError for what is meant as one and cannot be read."""
        ...


@dataclass(frozen=True, kw_only=True)
class JsonCalls:
    """A JSON object with `name` and `arguments` between two marks."""

    begin: str = "<tool_call>"
    end: str = "</tool_call>"
    names: tuple[str, ...] = ()
    """Tools there are; empty for any."""

    def calls(self, text: str) -> list[ToolCall]:
        """See ToolParser."""
        return [self._call(inside) for inside in _between(text, self.begin, self.end)]

    def _call(self, inside: str) -> ToolCall:
        try:
            found = json.loads(inside)
        except (ValueError, RecursionError) as error:
            raise PolicyError(f"a tool call must be JSON, got {_short(inside)}: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            raise PolicyError(f"a tool call must be an object with a name, got {_short(inside)}")
        arguments = found.get("arguments", {})
        if not isinstance(arguments, dict):
            raise PolicyError(f"the arguments of a tool call must be an object, got {_short(inside)}")
        if self.names and found["name"] not in self.names:
            raise PolicyError(f"there is no tool {_short(found['name'])}; there is {', '.join(self.names)}")
        return ToolCall(found["name"], arguments)


@dataclass(frozen=True, kw_only=True)
class TextCalls:
    """The text between two marks, such as code, as the argument `text` of a call."""

    begin: str = "<code>"
    end: str = "</code>"
    name: str = "code"
    """What the calls are called."""

    def calls(self, text: str) -> list[ToolCall]:
        """See ToolParser."""
        return [ToolCall(self.name, {"text": inside.strip("\n")}) for inside in _between(text, self.begin, self.end)]


def _between(text: str, begin: str, end: str) -> list[str]:
    """What stands between each pair of marks. Raises PolicyError for a mark that is not closed, or not opened."""
    found, inside = list[str](), None
    for piece in re.split(f"({re.escape(begin)}|{re.escape(end)})", text):
        if piece == begin:
            if inside is not None:
                raise PolicyError(f"{begin} stands within {begin}")
            inside = ""
        elif piece == end:
            if inside is None:
                raise PolicyError(f"{end} closes nothing")
            found.append(inside)
            inside = None
        elif inside is not None:
            inside = piece
    if inside is not None:
        raise PolicyError(f"{begin} is not closed")
    return found


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}...")
