"""Rewards of a response's text: a pattern, JSON, a format, a length. Each is made once, with its settings, and named in
a file of the user's: `short = in_length(200)`, `reward.function=mine.py:short`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

_JSON_BLOCK = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


def json_match(response: str, answer: str) -> float:
    """1.0 where the response's JSON equals the answer's: keys in any order, 1 and 1.0 alike, true and 1 not.

    The JSON is the last block between ``` fences, else the whole response. Raises ValueError if the answer is no JSON.
    """
    try:
        expected = json.loads(answer)
    except json.JSONDecodeError as error:
        raise ValueError(f"the answer of a JSON match must be JSON ({error}), got {answer[:80]!r}") from error
    found = parsed_json(response)
    return float(found is not None and _same(found[0], expected))


def valid_json(response: str) -> float:
    """1.0 where the response, or its last block between ``` fences, is JSON."""
    return float(parsed_json(response) is not None)


def parsed_json(response: str) -> tuple[Any] | None:
    """The response's JSON in a tuple (JSON may be null), or None where there is none."""
    blocks = _JSON_BLOCK.findall(response)
    try:
        return (json.loads(blocks[-1] if blocks else response),)
    except (json.JSONDecodeError, RecursionError):
        return None


def regex_match(pattern: str) -> Callable[..., float]:
    r"""A reward: 1.0 where the last match of `pattern` in the response is the answer, white space at its ends aside.

    The match is the pattern's first group, or all of it without one: `regex_match(r"Answer: (\d+)")`.
    """
    compiled = _compiled(pattern)

    def regex(response: str, answer: str) -> float:
        found = None
        for found in compiled.finditer(response):  # noqa: B007  the last one
            pass
        if found is None:
            return 0.0
        text = found.group(1 if compiled.groups else 0)
        return float(text is not None and text.strip() == answer.strip())

    return regex


def has_format(pattern: str) -> Callable[..., float]:
    """A reward: 1.0 where the whole response, white space at its ends aside, is of the form `pattern` (`.` takes line
    ends, too): `has_format("<think>.*</think><answer>.*</answer>")`."""
    compiled = _compiled(pattern)

    def form(response: str) -> float:
        return float(compiled.fullmatch(response.strip()) is not None)

    return form


def in_length(most: int, *, least: int = 0, slack: int = 0) -> Callable[..., float]:
    """A reward: 1.0 from `least` to `most` response tokens, falling evenly to 0.0 over `slack` tokens on both sides."""
    if not (0 <= least <= most and slack >= 0):
        raise ValueError(f"lengths must be 0 <= least <= most and slack >= 0, got {least}, {most} and {slack}")

    def length(response_ids: list[int]) -> float:
        over = max(len(response_ids) - most, least - len(response_ids), 0)
        return max(0.0, 1.0 - over / slack) if slack else float(not over)

    return length


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        return found.keys() == expected.keys() and all(_same(found[key], expected[key]) for key in found)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    return bool(found == expected)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error}), got {pattern!r}") from error
