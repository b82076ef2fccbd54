"""What a reward function takes, read from the names of its parameters.

    f(prompt, response, answer)                                     one row a call
    compute_score(data_source, solution_str, ground_truth, ...)     the same, as verl names them
    f(prompts, completions, **columns)                              lists in, a list out, as TRL names them

Every other parameter is the column of that name: one value a row, or a list where one of LISTS makes the function
batched. A function with names of its own is adapted in one line: `mine = adapt(theirs, text="response")`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

ROWS = {"solution_str": "response", "completion": "response", "ground_truth": "answer", "data_source": "source"}
"""Parameter of a function of one row -> the column it stands for where the data has none of its own name."""
LISTS = {
    "prompts": "prompt",
    "completions": "response",
    "completion_ids": "response_ids",
    "responses": "response",
    "answers": "answer",
    "solution_strs": "response",
    "ground_truths": "ground_truth",
    "data_sources": "data_source",
    "extra_infos": "extra_info",
}
"""Parameter of a function of many rows -> its column; one of them makes a function batched."""
RESPONSES = {"prompt", "response", "completion", "solution_str"}
"""Parameters that only a function of one row has."""
EXTRA_INFO = "extra_info"
"""verl's parameter for what else a row says: {} where the data says nothing."""
RULE = (
    "a reward function takes prompt, response, answer (one row), verl's data_source, solution_str, ground_truth, "
    "extra_info, or TRL's prompts, completions, **columns (lists), and any column by its name"
)


class Adapted:
    """A reward function whose parameters have other names than columns."""

    def __init__(self, function: Callable[..., Any], batched: bool | None, columns: Mapping[str, str]) -> None:
        self.function, self.batched, self.columns = function, batched, dict(columns)

    def __call__(self, *values: Any, **named: Any) -> Any:
        """The function as it is."""
        return self.function(*values, **named)


def adapt(function: Callable[..., Any], *, batched: bool | None = None, **columns: str) -> Any:
    """`function` as a reward: `adapt(theirs, text="response", gold="answer")` gives `text` the response column.

    batched: whether it takes lists and returns one; None: as its parameters' names say.
    """
    return Adapted(function, batched, columns)


@dataclass(frozen=True, kw_only=True)
class Signature:
    """How a reward function is called."""

    name: str
    batched: bool
    """Lists in, a list out."""
    parameters: Mapping[str, bool]
    """Parameter -> whether it must be given."""
    rest: bool
    """It takes what else the data has (`**columns`)."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> column, as `adapt` was told."""

    @property
    def as_verl(self) -> bool:
        """Whether it is written for verl, whose functions return their reward as `score` where they return a dict."""
        return any(name in self.parameters for name in ("solution_str", "solution_strs"))

    @property
    def named(self) -> tuple[str, ...]:
        """Columns that it may ask for by name."""
        return tuple(dict.fromkeys(name for parameter in self.parameters for name in self._candidates(parameter)))

    def bind(self, columns: Collection[str], extras: Collection[str] = ()) -> dict[str, str]:
        """Parameter -> column, among `columns` and the `extras` that only this data has.

        A parameter with a default and no column is left out; `**columns` takes all extras. Raises ValueError naming a
        parameter that no column can fill.
        """
        bound = {}
        for parameter, needed in self.parameters.items():
            column = self._column(parameter, {*columns, *extras})
            if column is not None:
                bound[parameter] = column
            elif needed and not (parameter == EXTRA_INFO and not self.batched):
                raise ValueError(
                    f"{self.name} asks for {parameter!r}, and there is no column "
                    f"{self.columns.get(parameter, parameter)!r}; there is {', '.join(sorted({*columns, *extras}))}; "
                    f"{RULE}; for other names: adapt(function, {parameter}=COLUMN)"
                )
        if self.rest:
            taken = {*bound, *bound.values()}
            bound |= {name: name for name in extras if name not in taken}
        return bound

    def constants(self, bound: Collection[str]) -> dict[str, Any]:
        """Arguments that are the same for every row."""
        needs = self.parameters.get(EXTRA_INFO, False) and EXTRA_INFO not in bound
        return {EXTRA_INFO: {}} if needs else {}

    def _column(self, parameter: str, available: Collection[str]) -> str | None:
        return next((column for column in self._candidates(parameter) if column in available), None)

    def _candidates(self, parameter: str) -> tuple[str, ...]:
        if parameter in self.columns:
            return (self.columns[parameter],)
        one = LISTS.get(parameter, parameter)
        return (parameter, one, ROWS.get(one, one))


def signature_of(function: Any) -> Signature:
    """How `function` (a function, a class of callables, an instance with __call__, or `adapt`'s result) is called.

    Raises ValueError with the rule where its parameters do not say it.
    """
    told: Mapping[str, str] = {}
    batched: bool | None = None
    if isinstance(function, Adapted):
        told, batched, function = function.columns, function.batched, function.function
    name = name_of(function)
    if inspect.isclass(function):
        _check_constructor(function, name)
        function = functools.partial(function.__call__, None)  # the instance is made where the rewards are
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(f"{name} does not say what it takes; {RULE}: wrap it in a function") from None
    parameters = {p.name: p.default is p.empty for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    rest = any(p.kind is p.VAR_KEYWORD for p in found)
    unnamed = [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]
    if unnamed or not parameters:
        got = f"{unnamed[0]!r}, which has no name to go by" if unnamed else "nothing it names"
        raise ValueError(f"{name} takes {got}; {RULE}: wrap it in a function")
    for parameter in told:
        if parameter not in parameters:
            raise ValueError(f"adapt: {name} has no parameter {parameter!r}; it has {', '.join(parameters)}")
    lists, rows = [p for p in parameters if p in LISTS], [p for p in parameters if p in RESPONSES]
    if batched is None and lists and rows:
        raise ValueError(
            f"{name} takes both {lists[0]!r} (lists) and {rows[0]!r} (one row), so it is not clear what it wants; "
            f"{RULE}; or say it: adapt(function, batched=True)"
        )
    return Signature(
        name=name,
        batched=bool(lists) if batched is None else batched,
        parameters=parameters,
        rest=rest,
        columns=told,
    )


def name_of(function: Any) -> str:
    """What to call a reward function in messages."""
    while isinstance(function, (Adapted, functools.partial)):
        function = function.function if isinstance(function, Adapted) else function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _check_constructor(kind: type, name: str) -> None:
    if not any("__call__" in vars(base) for base in kind.__mro__):
        raise ValueError(f"{name} is a class whose instances cannot be called; give it a __call__")
    needed = [
        p.name
        for p in inspect.signature(kind).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise ValueError(
            f"{name} is a class that needs {', '.join(needed)} to be made; name an instance instead "
            f"(scorer = {name}(...) in the file, and file.py:scorer)"
        )
