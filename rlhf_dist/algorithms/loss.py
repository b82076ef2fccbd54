"""A loss as one function: what it reads, asks of the model and averages over stands above it, its settings inside it.

    @loss(reads=("advantages",), outputs=("log_probs", "entropy"), average="tokens")
    def entropic(model, rows, bonus: float = 0.0):
        return -rows["advantages"] * model.log_probs - bonus * model.entropy, {}

    actor.update_actor(batch, loss=entropic(0.01))      a `FunctionLoss`: settings that travel to the workers

What depends on the settings is a function of them: `average=lambda settings: settings["average"]`. `contract.py` says
what the function gets and returns; any object with the same members is a loss too.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec

from rlhf_dist.algorithms.contract import Average, ModelOutput, Rows, is_given
from rlhf_dist.algorithms.outputs import Output, key_of

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class FunctionLoss:
    """A loss function with its settings."""

    kind: LossFunction[Any]
    settings: tuple[tuple[str, Any], ...]
    """Every setting, those that were not given included."""

    def __post_init__(self) -> None:
        # A number of a state is checked as it starts; the loss is made again with each number that is held.
        self.kind.check(**{key: getattr(value, "first", value) for key, value in self.settings})

    @property
    def name(self) -> str:
        """For errors and metrics."""
        return self.kind.name

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Loss`."""
        reads: tuple[str, ...] = self._declared(self.kind.reads)
        return reads

    @property
    def outputs(self) -> tuple[Output, ...]:
        """See `Loss`."""
        outputs: tuple[Output, ...] = self._declared(self.kind.outputs)
        return outputs

    @property
    def average(self) -> Average:
        """See `Loss`."""
        average: Average = self._declared(self.kind.average)
        return average

    def _declared(self, what: Any) -> Any:
        return what(dict(self.settings)) if callable(what) else what

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Loss`. Raises ValueError where the model gave less than the loss asked for."""
        for output in self.outputs:
            if not is_given(model, output):
                raise ValueError(f"the loss {self.name} needs {key_of(output)} of the model, and got none")
        return self.kind.function(model, rows, **dict(self.settings))

    def __repr__(self) -> str:
        usual = {key: parameter.default for key, parameter in self.kind.signature.parameters.items()}
        given = [f"{key}={value}" for key, value in self.settings if str(value) != str(usual[key])]
        return f"{self.name}({', '.join(given)})"


@dataclass(frozen=True)
class LossFunction(Generic[P]):
    """What the decorated name stands for: settings in, a loss out."""

    function: Callable[Concatenate[ModelOutput, Rows, P], tuple[Tensor, dict[str, Tensor]]]
    name: str
    reads: tuple[str, ...] | Callable[[Settings], tuple[str, ...]]
    outputs: tuple[Output, ...] | Callable[[Settings], tuple[Output, ...]]
    average: Average | Callable[[Settings], Average]
    checks: Callable[..., None] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> FunctionLoss:
        """Raises ValueError for settings that it does not have, or that make no sense."""
        known = list(self.signature.parameters)
        for key in kwargs:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise ValueError(
                    f"the loss {self.name} has no setting {key!r}; it has {', '.join(known) or 'none'}"
                    + (f"; did you mean {near[0]!r}?" if near else "")
                )
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ValueError(f"the loss {self.name}: {error}; its settings are {', '.join(known) or 'none'}") from None
        bound.apply_defaults()
        return FunctionLoss(self, tuple(bound.arguments.items()))

    @property
    def signature(self) -> inspect.Signature:
        """Of its settings alone."""
        whole = inspect.signature(self.function)
        return whole.replace(parameters=list(whole.parameters.values())[2:], return_annotation=FunctionLoss)

    def check(self, **settings: Any) -> None:
        """Raise ValueError for settings that make no sense."""
        if self.checks is not None:
            self.checks(**settings)

    def __reduce__(self) -> tuple[Any, ...]:
        # The module's name means this object, so pickle could not find the function behind it. Our own losses travel
        # by name; a user's travels by value, since workers cannot import the user's file.
        if self.function.__module__.startswith("rlhf_dist."):
            return _import_loss, (self.function.__module__, self.function.__qualname__)
        return LossFunction, (self.function, self.name, self.reads, self.outputs, self.average, self.checks)


def loss(
    *,
    reads: tuple[str, ...] | Callable[[Settings], tuple[str, ...]] = (),
    outputs: tuple[Output, ...] | Callable[[Settings], tuple[Output, ...]] = ("log_probs",),
    average: Average | Callable[[Settings], Average],
    check: Callable[..., None] | None = None,
) -> Callable[[Callable[Concatenate[ModelOutput, Rows, P], tuple[Tensor, dict[str, Tensor]]]], LossFunction[P]]:
    """Declare a function `(model, rows, **settings) -> (values, metrics)` as a loss.

    reads: columns besides the sequence, the mask and the group id. outputs: what the model is asked for. average: what
    values and metrics are averaged over, and so their shape. check: called with the settings when they are given;
    raises ValueError.
    """

    for what, names in (("reads", reads), ("outputs", outputs)):
        if isinstance(names, str):  # the comma of a tuple of one was left out, and a text is a sequence of letters
            raise ValueError(f"@loss({what}=...) takes a tuple of names, got the text {names!r}; write ({names!r},)")

    def wrap(
        function: Callable[Concatenate[ModelOutput, Rows, P], tuple[Tensor, dict[str, Tensor]]],
    ) -> LossFunction[P]:
        if len(inspect.signature(function).parameters) < 2:
            raise TypeError(f"the loss {function.__name__} takes (model, rows, its settings)")
        made = LossFunction(function, function.__name__, reads, outputs, average, check)
        object.__setattr__(made, "__doc__", function.__doc__)
        object.__setattr__(made, "__wrapped__", function)
        return made

    return wrap


def _import_loss(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
