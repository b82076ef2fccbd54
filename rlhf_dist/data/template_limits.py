"""What a chat template may take: seconds, steps and characters, counted by the template itself.

A template comes with a model that somebody else made. Jinja's sandbox keeps it from Python, not from running for ever,
and a worker renders in threads, where no signal ends it. So every round of a loop and every call counts, in whatever
thread, and looks at the clock now and then; what makes long texts of short ones (`*`, `~`, `+`, padding) is measured
before it does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from rlhf_dist.data.template_growth import FILTERS, length_of_filter, length_of_method, length_of_percent

SECONDS = 5.0
"""Longest that one rendering may take; a usual one takes a millisecond."""
STEPS = 5_000_000
"""Most rounds of loops and calls of one rendering."""
CHARACTERS = 32 << 20
"""Longest text of one rendering, and of any value in it; longest list, too."""
_LOOK_EVERY = 256
"""Steps between two looks at the clock."""


class TemplateTooLong(TemplateError):
    """A template that does not end, or says too much."""


class _Spent(threading.local):
    """Of the rendering of this thread."""

    steps = 0
    deadline = float("inf")


_spent = _Spent()


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, a template that takes too much raises TemplateTooLong. May be nested: the outer one counts."""
    if _spent.deadline != float("inf"):
        yield
        return
    _spent.steps, _spent.deadline = 0, time.monotonic() + SECONDS
    try:
        yield
    finally:
        _spent.deadline = float("inf")


def joined(pieces: Iterable[str]) -> str:
    """The text that a template writes, as long as it may be."""
    kept, length = list[str](), 0
    for piece in pieces:
        _step()
        length += len(piece)
        _check_length(length)
        kept.append(piece)
    return "".join(kept)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, with counted loops, calls and lengths."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters[_COUNTED], self.filters[_CONCATENATED] = _counted, _concatenated
        for name in FILTERS:
            self.filters[name] = _measured(name, self.filters[name])
        self.globals.pop("lipsum", None)  # texts of any length, of nothing

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Counting().visit(tree)  # type: ignore[no-any-return]

    def call(self, context: Any, called: Any, /, *arguments: Any, **keywords: Any) -> Any:
        """Counted, and refused where a method of a text would make a very long one."""
        _step()
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps `format`
        if isinstance(text := getattr(method, "__self__", None), str):
            _check_length(length_of_method(method.__name__, text, arguments, keywords))
        return super().call(context, called, *arguments, **keywords)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refused where its result would be very long."""
        _step()
        sized = [one for one in (left, right) if isinstance(one, str | list | tuple)]
        if operator == "*" and sized:
            times = right if sized[0] is left else left
            _check_length(len(sized[0]) * (times if isinstance(times, int) else 1))
        elif operator == "+" and len(sized) == 2:
            _check_length(len(left) + len(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_length(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, str):
            _check_length(length_of_percent(left, right if isinstance(right, tuple) else (right,)))
        return super().call_binop(context, operator, left, right)


_ONE_BY_ONE = frozenset({"slice", "wordwrap"})
"""Filters that are loops of Python themselves."""
_COUNTED, _CONCATENATED = "counted by rlhf-dist", "concatenated by rlhf-dist"
"""No names that a template can write."""


class _Counting(NodeTransformer):
    """Every loop goes over a counted iterable, every `~` is measured."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        node.iter = nodes.Filter(node.iter, _COUNTED, [], [], None, None, lineno=node.lineno)
        return self.generic_visit(node)  # type: ignore[return-value]

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        pieces = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(pieces, _CONCATENATED, [], [], None, None, lineno=node.lineno)


def _counted(values: Any) -> Any:
    """A list stays one, since loops ask for lengths and neighbours; its rounds are counted at once."""
    if isinstance(values, list | tuple | str | dict | range):
        _step(len(values))
        return values
    return _each(values) if isinstance(values, Iterable) else values


def _each(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _step()
        yield value


def _concatenated(pieces: list[Any]) -> str:
    _step()
    texts = [str(piece) for piece in pieces]
    _check_length(sum(map(len, texts)))
    return "".join(texts)


def _measured(name: str, function: Any) -> Any:
    """A filter that is refused where it would make very much of what it is given."""
    passes = hasattr(function, "jinja_pass_arg")  # which of context and environment Jinja puts before the value

    def measured(*given: Any, **keywords: Any) -> Any:
        first, *others = given[passes:]
        if isinstance(first, Iterator):
            first = list(_each(first))
        length = length_of_filter(name, first, others, keywords)
        _check_length(length)
        _step(1 + (length if name in _ONE_BY_ONE else 0))
        return function(*given[:passes], first, *others, **keywords)

    if passes:
        measured.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return measured


def _step(count: int = 1) -> None:
    before = _spent.steps
    _spent.steps += count
    if _spent.steps > STEPS:
        raise TemplateTooLong(f"it must end within {STEPS} rounds of loops and calls, and has taken as many")
    if before // _LOOK_EVERY != _spent.steps // _LOOK_EVERY and time.monotonic() > _spent.deadline:
        raise TemplateTooLong(f"it must end within {SECONDS:g} s, and has not")


def _check_length(length: int) -> None:
    if length > CHARACTERS:
        raise TemplateTooLong(f"a text in it may have {CHARACTERS} characters, and would have {length:.3g}")
