"""Parsers: a response's text as columns. Small frozen objects, sent by value from the user's file, as losses are.

    Number("Score:", low=0, high=5)                         "... Score: 4"        score 4.0
    Choice({"A": 1, "B": 0, "tie": 0.5})                    "... [[B]]"           choice 0.0
    Pattern(r"(?P<why>.*)Score: (?P<score>[0-9.]+)")        by named groups       why "...", score "4"
    JsonFields({"score": "number", "why": "text"})          '... {"score": 4}'    score 4.0, why ""
    Numbers("Scores:")                                      "Scores: 3, 1, 5"     numbers [3.0, 1.0, 5.0]

A parser of one's own is any object with `columns` (name -> "number", "text" or "numbers") that is called with a text
and returns a value for each, or None where it cannot. A response that could not be parsed has a number that is missing
(`rlhf_dist.missing`), an empty text or no numbers, and 0 in the column `parsed`; it is never a 0 by itself, and the
share of them is the metric `unparsed`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from rlhf_dist.batch import Column
from rlhf_dist.missing import MISSING

Kind = Literal["number", "text", "numbers"]
"""One number a row, a text, or as many numbers as there are."""
PARSED = "parsed"
"""Column of what could be parsed: 1, else 0."""
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


@runtime_checkable
class Parser(Protocol):
    """What makes columns of a text."""

    @property
    def columns(self) -> Mapping[str, Kind]:
        """The columns it writes."""
        ...

    def __call__(self, text: str) -> Mapping[str, Any] | None:
        """A value for each column; None where the text has none."""
        ...


@dataclass(frozen=True)
class Number:
    """The last number behind `after`, or in the whole text."""

    after: str = ""
    """A text that stands before it, `Score:`; what lies between may be spaces, `*` and brackets."""
    low: float = -math.inf
    """A number below it was not meant."""
    high: float = math.inf
    """A number above it was not meant."""
    column: str = "score"

    @property
    def columns(self) -> Mapping[str, Kind]:
        return {self.column: "number"}

    def __call__(self, text: str) -> Mapping[str, Any] | None:
        found = re.findall(_behind(self.after) + f"({_NUMBER})", text)
        if not found or not self.low <= float(found[-1]) <= self.high:
            return None
        return {self.column: float(found[-1])}


@dataclass(frozen=True)
class Choice:
    """The last of some words, as a number: who won, or a grade."""

    values: Mapping[str, float]
    """Word -> its number, {"A": 1, "B": 0, "tie": 0.5}. A word counts where no letter or digit touches it."""
    after: str = ""
    """A text that stands before it, `Winner:`."""
    column: str = "choice"

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("Choice needs words, each with its number, got none; write Choice({'yes': 1, 'no': 0})")

    @property
    def columns(self) -> Mapping[str, Kind]:
        return {self.column: "number"}

    def __call__(self, text: str) -> Mapping[str, Any] | None:
        words = "|".join(re.escape(word) for word in sorted(self.values, key=len, reverse=True))
        found = re.findall(_behind(self.after) + rf"(?<![^\W_])({words})(?![^\W_])", text)
        return {self.column: float(self.values[found[-1]])} if found else None


@dataclass(frozen=True)
class Pattern:
    """The named groups of a regular expression, where it is found for the first time."""

    pattern: str
    """`.` takes line ends, too."""
    numbers: tuple[str, ...] = ()
    """Groups that are numbers; the others are texts."""

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.pattern, re.DOTALL).groupindex
        except re.error as error:
            raise ValueError(f"Pattern cannot read the regular expression {self.pattern!r}: {error}") from error
        if not groups or not set(self.numbers) <= groups.keys():
            missing = [name for name in self.numbers if name not in groups] or ["NAME"]
            raise ValueError(
                f"Pattern {self.pattern!r} has the groups {', '.join(groups) or 'none'} and needs one called "
                f"{missing[0]!r}; write (?P<{missing[0]}>...)"
            )

    @property
    def columns(self) -> Mapping[str, Kind]:
        names = re.compile(self.pattern, re.DOTALL).groupindex
        return {name: "number" if name in self.numbers else "text" for name in names}

    def __call__(self, text: str) -> Mapping[str, Any] | None:
        found = re.search(self.pattern, text, re.DOTALL)
        return None if found is None else {name: value or "" for name, value in found.groupdict().items()}


@dataclass(frozen=True)
class JsonFields:
    """Fields of the last JSON object in the text; `a.b` is a field of a field."""

    fields: Mapping[str, Kind]
    """Field -> what it is; its column is called as its last part."""
    optional: tuple[str, ...] = field(default=())
    """Fields that may be missing where they are texts or lists: empty then."""

    def __post_init__(self) -> None:
        if wrong := [kind for kind in self.fields.values() if kind not in get_args(Kind)]:
            raise ValueError(f"JsonFields has a field of kind {wrong[0]!r}; it can be {', '.join(get_args(Kind))}")
        if needed := [name for name in self.optional if self.fields.get(name, "number") == "number"]:
            raise ValueError(
                f"JsonFields cannot have the optional field {needed[0]!r}: only texts and lists may be missing"
            )

    @property
    def columns(self) -> Mapping[str, Kind]:
        return {path.rpartition(".")[2]: kind for path, kind in self.fields.items()}

    def __call__(self, text: str) -> Mapping[str, Any] | None:
        found = _last_object(text)
        if found is None:
            return None
        values: dict[str, Any] = {}
        for path, kind in self.fields.items():
            value: Any = found
            for part in path.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is None and path in self.optional:
                value = "" if kind == "text" else []
            if value is None or isinstance(value, bool):
                return None
            values[path.rpartition(".")[2]] = value
        return values


@dataclass(frozen=True)
class Numbers:
    """All numbers behind the last `after`, on one line: what a judge says of several responses at once."""

    after: str = ""
    """A text that stands before them, `Scores:`."""
    column: str = "numbers"

    @property
    def columns(self) -> Mapping[str, Kind]:
        return {self.column: "numbers"}

    def __call__(self, text: str) -> Mapping[str, Any] | None:
        if self.after and self.after not in text:
            return None
        line = text.rpartition(self.after)[2] if self.after else text
        found = re.findall(_NUMBER, line.strip().split("\n")[0] if self.after else line)
        return {self.column: [float(one) for one in found]} if found else None


def parsed_columns(parser: Parser, texts: Sequence[str | None]) -> tuple[dict[str, Column], int]:
    """The columns of some responses, `parsed` among them, and how many could not be parsed; None: there is none."""
    values = [None if text is None else _checked(parser, _said(parser, text)) for text in texts]
    columns: dict[str, Column] = {}
    for name, kind in parser.columns.items():
        rows = [None if row is None else row[name] for row in values]
        if kind == "number":
            numbers = np.array([0.0 if one is None else one for one in rows], dtype=np.float32)
            numbers[[one is None for one in rows]] = MISSING
            columns[name] = Column(numbers)
        elif kind == "text":
            columns[name] = Column.strings(["" if one is None else one for one in rows])
        else:
            columns[name] = Column.ragged([[] if one is None else one for one in rows], dtype=np.float32)
    columns[PARSED] = Column.dense([row is not None for row in values], dtype=np.uint8)
    return columns, sum(row is None for row in values)


def columns_of(parser: Any) -> tuple[str, ...]:
    """Columns that `parser` writes, `parsed` the last. Raises ValueError for what is no parser."""
    if not isinstance(parser, Parser) or isinstance(parser, type):
        raise ValueError(
            f"parser= takes an object with columns that is called with a text, such as Number('Score:') of "
            f"rlhf_dist.parsers, got {parser!r}"
        )
    kinds = dict(parser.columns)
    wrong = [f"{name}={kind!r}" for name, kind in kinds.items() if kind not in get_args(Kind)]
    if wrong or not kinds or PARSED in kinds:
        said = wrong[0] if wrong else "no column" if not kinds else f"a column {PARSED!r}, which every parser writes"
        raise ValueError(f"{type(parser).__name__}.columns has {said}; it is name -> {', '.join(get_args(Kind))}")
    return (*kinds, PARSED)


def _said(parser: Parser, text: str) -> Mapping[str, Any] | None:
    try:
        return parser(text)
    except Exception as error:  # the user's own code
        shown = text if len(text) <= 200 else f"{text[:200]}..."
        raise ValueError(
            f"parser {type(parser).__name__} raised {type(error).__name__}: {error} for the response {shown!r}; it "
            "returns None for what it cannot read"
        ) from error


def _checked(parser: Parser, found: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The values by their kind; None where one is none: `Score: many`, a list with a word in it, infinity."""
    if found is None:
        return None
    checked: dict[str, Any] = {}
    for name, kind in parser.columns.items():
        value = found.get(name)
        try:
            if kind == "text" and not isinstance(value, str):
                return None
            if kind == "number":
                value = float(value)  # type: ignore[arg-type]
            elif kind == "numbers":
                value = [float(one) for one in value]  # type: ignore[union-attr]
        except (TypeError, ValueError):
            return None
        if kind != "text" and not np.isfinite(np.asarray(value, dtype=np.float32)).all():
            return None
        checked[name] = value
    return checked


def _behind(text: str) -> str:
    return re.escape(text) + r"[\s*_`\[({:]*" if text else ""


def _last_object(text: str) -> dict[str, Any] | None:
    """The last JSON object that stands in the text, outermost."""
    decoder, found, at = json.JSONDecoder(), None, text.find("{")
    while at >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            at += 1
        else:
            found = value
        at = text.find("{", at)
    return found if isinstance(found, dict) else None
