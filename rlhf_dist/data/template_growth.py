"""How long a method or filter of a chat template makes its result, at most, told before it is called.

Upper bounds from lengths alone: a width says how long a field is, and a text comes as often as there is a place for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

FILTERS = ("batch", "center", "format", "indent", "join", "replace", "slice", "wordwrap")
"""Filters that make more of what they are given."""
_DIRECTIVE = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\d+|\*)?(?:\.(\d+|\*))?")
_FIELD = re.compile(r"\{[^{}:]*:?([^{}]*)(\{?)")
_LONGEST_NUMBER = 4300
"""Digits: Python writes no longer one."""


def length_of_method(name: str, text: str, given: Sequence[Any], named: Mapping[str, Any]) -> int:
    """Characters of `text.NAME(...)`, at most."""
    if name in ("format", "format_map"):
        return _of_fields(text, [*given, *named.values()])
    if name == "replace":
        return _replaced(text, *_arguments(given, named, "old", "new", "count"))
    if name == "join":
        return _joined(given[0] if given else (), text)
    if name == "expandtabs":
        return len(text) + text.count("\t") * _number([*given, *named.values(), 8][0])
    if name == "translate":
        return len(text) * max(1, size(given[0]) if given else 1)
    if name in ("center", "ljust", "rjust", "zfill"):
        return max(len(text), _number(given[0]) if given else 0)
    return len(text)


def length_of_filter(name: str, first: Any, given: Sequence[Any], named: Mapping[str, Any]) -> int:
    """Characters, or entries of lists, that one of FILTERS makes of `first`, at most."""
    if name == "join":
        return _joined(first, *_arguments(given, named, "d")[:1])
    if name in ("batch", "slice"):
        return _number(_arguments(given, named, "linecount" if name == "batch" else "slices")[0])
    text = str(first)
    if name == "format":
        return length_of_percent(text, [*given, *named.values()])
    if name == "replace":
        return _replaced(text, *_arguments(given, named, "old", "new", "count"))
    width = _arguments(given, named, "width")[0]
    if name == "indent":
        return len(text) + (len(text.splitlines()) + 1) * (
            len(width) if isinstance(width, str) else _number(width or 4)
        )
    if name == "wordwrap":
        between = _arguments(given, named, "width", "break_long_words", "wrapstring")[2]
        return len(text) * (1 + size(between or "\n"))
    return max(len(text), _number(width or 80))


def length_of_percent(text: str, values: Sequence[Any]) -> int:
    """Characters of `text % values`, at most."""
    found = [part for one in _DIRECTIVE.findall(text) for part in one]
    asked = max((_number(value) for value in values), default=0) if "*" in found else 0
    widths = sum(asked if part == "*" else _number(part) for part in found)
    return len(text) + widths + len(found) // 2 * max(map(size, values), default=0)


def size(value: Any) -> int:
    """Characters that a value has as a text, roughly and at most."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return min(value.bit_length() // 3 + 2, _LONGEST_NUMBER)
    if isinstance(value, Mapping):
        return sum(size(name) + size(one) + 8 for name, one in value.items())
    if isinstance(value, list | tuple):
        return sum(size(one) + 4 for one in value)
    return 32


def _of_fields(text: str, values: Sequence[Any]) -> int:
    fields = _FIELD.findall(text)
    widths = sum(_number(part) for spec, _ in fields for part in re.findall(r"\d+", spec))
    if any(nested for _, nested in fields):  # {:{}}: a value says how wide another is
        parts = [part for value in values for part in re.findall(r"\d+", str(value))]
        widths += len(fields) * max(map(_number, parts), default=0)
    return len(text) + widths + len(fields) * max(map(size, values), default=0)


def _replaced(text: str, old: Any, new: Any, count: Any) -> int:
    times = text.count(str(old))
    if isinstance(count, int) and count >= 0:
        times = min(times, count)
    return len(text) + times * max(size(new) - size(old), 0)


def _joined(values: Any, between: Any) -> int:
    if not isinstance(values, list | tuple | str | Mapping):
        return 0  # an iterator, whose rounds count
    return sum(map(size, values)) + len(values) * size(between or "")


def _arguments(given: Sequence[Any], named: Mapping[str, Any], *names: str) -> list[Any]:
    """By position or name; None for what is not given."""
    return [given[place] if place < len(given) else named.get(name) for place, name in enumerate(names)]


def _number(value: Any) -> int:
    """A width: of digits that say an absurd one, an absurd one."""
    if isinstance(value, str):
        return (int(value) if len(value) < 19 else 10**18) if value.isdecimal() else 0
    return max(value, 0) if isinstance(value, int) else 0
