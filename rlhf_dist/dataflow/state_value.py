"""A number of a state in a recipe: known when the op runs, written where a number is written.

    actor.update_actor(batch, loss=ppo_clip(0.2, kl_coef=0.5 * state.value("kl_coef")))
                                                         ^ an expression, sent to no worker
    when the node is launched: loss with kl_coef=0.031 <- what the controller holds then

Arithmetic on it makes another one. Its value cannot be asked for: a condition in a recipe would be decided once,
when the recipe is traced, and hold for ever. Only an object that checks its own settings (a loss in its
`__post_init__`) may compare it; it sees the number that the state starts with, and sees the real one each time
the op runs.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

from rlhf_dist.dataflow.graph import GraphError

Numbers = Mapping[str, Mapping[str, float]]
"""State -> key -> number."""


@dataclass(frozen=True, eq=False)
class StateValue:
    """An expression over numbers of states."""

    text: str
    """`kl.value('coef') * 0.5`, for messages and drawings."""
    states: tuple[str, ...]
    """States it reads."""
    first: float
    """Its number at the start of a run."""
    compute: Callable[[Numbers], float]
    """Its number for those that are held."""
    line: Callable[[], str]
    """The recipe's line that is being traced."""

    def _with(self, function: Callable[..., float], sign: str, other: Any, *, turned: bool = False) -> StateValue:
        if not isinstance(other, StateValue | int | float):
            raise GraphError(f"{self.line()}: {self} {sign} {other!r}: a state's number is combined with numbers only")
        left, right = (other, self) if turned else (self, other)

        def compute(numbers: Numbers) -> float:
            return function(resolved(left, numbers), resolved(right, numbers))

        text, states = f"({left} {sign} {right})", states_read([left, right])
        try:
            first = function(_first(left), _first(right))
        except ArithmeticError as error:
            raise GraphError(
                f"{self.line()}: {text} has no value for the numbers at the start, {_first(left)} and {_first(right)} "
                f"({error})"
            ) from error
        return StateValue(text, states, first, compute, self.line)

    def __add__(self, other: Any) -> StateValue:
        return self._with(operator.add, "+", other)

    def __radd__(self, other: Any) -> StateValue:
        return self._with(operator.add, "+", other, turned=True)

    def __sub__(self, other: Any) -> StateValue:
        return self._with(operator.sub, "-", other)

    def __rsub__(self, other: Any) -> StateValue:
        return self._with(operator.sub, "-", other, turned=True)

    def __mul__(self, other: Any) -> StateValue:
        return self._with(operator.mul, "*", other)

    def __rmul__(self, other: Any) -> StateValue:
        return self._with(operator.mul, "*", other, turned=True)

    def __truediv__(self, other: Any) -> StateValue:
        return self._with(operator.truediv, "/", other)

    def __rtruediv__(self, other: Any) -> StateValue:
        return self._with(operator.truediv, "/", other, turned=True)

    def __pow__(self, other: Any) -> StateValue:
        return self._with(operator.pow, "**", other)

    def __rpow__(self, other: Any) -> StateValue:
        return self._with(operator.pow, "**", other, turned=True)

    def __neg__(self) -> StateValue:
        return self._with(operator.mul, "*", -1)

    def __lt__(self, other: Any) -> bool:
        return bool(self._asked(f"{self} < {other}") < _first(other))

    def __le__(self, other: Any) -> bool:
        return bool(self._asked(f"{self} <= {other}") <= _first(other))

    def __gt__(self, other: Any) -> bool:
        return bool(self._asked(f"{self} > {other}") > _first(other))

    def __ge__(self, other: Any) -> bool:
        return bool(self._asked(f"{self} >= {other}") >= _first(other))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StateValue):
            return self.text == other.text
        return isinstance(other, int | float) and self._asked(f"{self} == {other}") == other

    def __hash__(self) -> int:
        return hash(self.text)

    def __deepcopy__(self, memo: Any) -> StateValue:
        return self

    def __reduce__(self) -> NoReturn:
        raise GraphError(
            f"{self.line()}: {self} is inside something that is sent to a worker as it is (a closure, perhaps), so its "
            "number would never be filled in; keep it as a field of the loss, or give it as a setting of the op"
        )

    def __bool__(self) -> bool:
        """For an object's own methods it is no 0, at any step: a loss says that it reads what it may need."""
        self._asked(f"a condition on {self}")
        return True

    def __float__(self) -> float:
        self._refuse(f"float({self})")

    def __int__(self) -> int:
        self._refuse(f"int({self})")

    def __index__(self) -> int:
        self._refuse(f"int({self})")

    def __str__(self) -> str:
        return self.text

    def _asked(self, what: str) -> float:
        """The number at the start, for an object that checks its settings. Raises GraphError for anybody else."""
        frame = sys._getframe(2)
        if frame.f_code.co_varnames[:1] != ("self",):
            # A function that checks one setting on behalf of an object.
            frame = frame.f_back or frame
        if frame.f_code.co_varnames[:1] != ("self",):
            self._refuse(what)
        return self.first

    def _refuse(self, what: str) -> NoReturn:
        raise GraphError(
            f"{self.line()}: {what} needs the number, which is known when an op runs and changes from step to step; "
            "decide in a state_op or a host op, which are given the number, or write arithmetic (+ - * / **)"
        )


def value_of(state: str, key: str, first: float, line: Callable[[], str]) -> StateValue:
    """The number `key` of `state`, which starts as `first`; line: see StateValue."""
    return StateValue(f"{state}.value({key!r})", (state,), first, lambda numbers: numbers[state][key], line)


def states_read(value: Any) -> tuple[str, ...]:
    """States whose numbers `value` takes: a setting, or what holds some (a loss, a list, a mapping)."""
    return tuple(dict.fromkeys(state for found in _within(value) for state in found.states))


def resolved(value: Any, numbers: Numbers) -> Any:
    """`value` with the numbers that are held now. A dataclass is made again, and so checks them."""
    if isinstance(value, StateValue):
        return value.compute(numbers)
    if not states_read(value):
        return value
    parts = {name: resolved(one, numbers) for name, one in _parts(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = {field.name for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: one for name, one in parts.items() if name in made})
    if isinstance(value, Mapping):
        return parts
    if isinstance(value, list | tuple):
        return getattr(type(value), "_make", type(value))(parts.values())
    copied = copy.copy(value)
    vars(copied).update(parts)
    return copied


def _within(value: Any, above: tuple[int, ...] = ()) -> Iterator[StateValue]:
    if isinstance(value, StateValue):
        yield value
    elif id(value) not in above:  # a user's object may lead back to itself
        for _, one in _parts(value):
            yield from _within(one, (*above, id(value)))


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """What a setting holds: fields of a loss, entries of a mapping or a sequence."""
    if isinstance(value, StateValue | type | ModuleType) or callable(value) and not hasattr(value, "reads"):
        return ()
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, list | tuple):
        return enumerate(value)
    return getattr(value, "__dict__", {}).items()


def _first(value: Any) -> Any:
    return value.first if isinstance(value, StateValue) else value
