"""A recipe: a function over roles. Its parameter list is the role list; no critic parameter, no critic process.

    @recipe
    def ppo(prompts: Prompts, actor: Actor, critic: Critic, reference: Reference, reward: Reward, cfg: PPO): ...

Parameters are told apart by their annotation: a source (`Prompts`, `Examples`, `Preferences`, plain
`Batch`), a role interface, a `State`, and `cfg` with the recipe's own frozen dataclass.

`@recipe(evaluation=function)` names another function over (some of) the same roles, which is run on held-out rows.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, cast, overload

from rlhf_dist.batch import Batch
from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.roles import Prompts, State, ops_of
from rlhf_dist.schema import COLUMNS, FIELD_KINDS


@dataclass(frozen=True)
class Recipe:
    """A recipe function with its parameters sorted."""

    function: Callable[..., None]
    name: str
    file: Path
    sources: Mapping[str, type]
    roles: Mapping[str, type]
    states: Mapping[str, type[State]]
    config: type | None
    """The dataclass of the `cfg` parameter; None if the recipe has none."""
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Role -> columns its ops also read where the batch has them: what a reward function names as parameters."""
    evaluation: Recipe | None = None
    """What is run on held-out rows; None: what `rlhf_dist/held_out.py` makes of the recipe itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.function(*args, **kwargs)

    @property
    def source_columns(self) -> dict[str, tuple[str, ...]]:
        """Source parameter -> columns it emits."""
        return {name: (*cast(Any, kind).columns, *self.source_fields(name)) for name, kind in self.sources.items()}

    def source_fields(self, source: str) -> Mapping[str, str]:
        """Fields of the file's rows that come as columns of their own, with their kinds (`Prompts.fields`)."""
        fields: Mapping[str, str] = getattr(self.sources[source], "fields", {})
        return fields


def follows(key: str) -> Any:
    """Default of a field of a recipe's dataclass that has the value of another setting unless it is set itself.

    max_tokens: int = follows("actor.rollout.max_response_tokens")
    """
    return field(default=f"${{{key}}}")


def _check_fields(recipe: str, kind: Any) -> None:
    for name, what in getattr(kind, "fields", {}).items():
        if name in COLUMNS:
            raise GraphError(
                f"recipe {recipe}: {kind.__name__}.fields names {name!r}, which is a column already "
                f"({COLUMNS[name].meaning}); leave it out, or call the field otherwise"
            )
        if what not in FIELD_KINDS:
            raise GraphError(
                f"recipe {recipe}: {kind.__name__}.fields says that {name!r} is {what!r}; it can be "
                f"{', '.join(FIELD_KINDS)}"
            )


@overload
def recipe(function: Callable[..., None]) -> Recipe: ...


@overload
def recipe(*, evaluation: Callable[..., None] | None = None) -> Callable[[Callable[..., None]], Recipe]: ...


def recipe(
    function: Callable[..., None] | None = None, *, evaluation: Callable[..., None] | None = None
) -> Recipe | Callable[[Callable[..., None]], Recipe]:
    """Make a recipe of a function. Raises GraphError for a parameter whose type says nothing.

    evaluation: a function over one source, which is held-out rows, and roles of the recipe, those that nothing else
    asks among them; it may read `cfg`, and trains nothing.
    """
    if function is not None:
        return _recipe(function)
    asks = None if evaluation is None else _recipe(evaluation)

    def make(function: Callable[..., None]) -> Recipe:
        made = _recipe(function)
        if asks is None:
            return made
        _check_evaluation(made, asks)
        return replace(made, evaluation=asks)

    return make


def _check_evaluation(made: Recipe, evaluation: Recipe) -> None:
    where = f"recipe {made.name}: its evaluation {evaluation.name}"
    others = [name for name, kind in evaluation.roles.items() if made.roles.get(name) is not kind]
    if others:
        raise GraphError(
            f"{where} must have roles of the recipe, with their kinds, got {', '.join(others)}; name them there"
        )
    if len(evaluation.sources) != 1 or evaluation.states:
        raise GraphError(
            f"{where} must have one source, which is held-out rows, and no state, got "
            f"{len(evaluation.sources)} sources and {len(evaluation.states)} states"
        )
    if evaluation.config not in (None, made.config):
        raise GraphError(f"{where} must read the recipe's own settings, got {evaluation.config!r}")


def _recipe(function: Callable[..., None]) -> Recipe:
    hints = typing.get_type_hints(function)
    sources: dict[str, type] = {}
    roles: dict[str, type] = {}
    states: dict[str, type[State]] = {}
    config: type | None = None
    for name in inspect.signature(function).parameters:
        kind = hints.get(name)
        if isinstance(kind, type) and issubclass(kind, Batch):
            sources[name] = Prompts if kind is Batch else kind
            _check_fields(function.__name__, sources[name])
        elif isinstance(kind, type) and issubclass(kind, State):
            states[name] = kind
        elif isinstance(kind, type) and is_dataclass(kind):
            config = kind
        elif isinstance(kind, type) and ops_of(kind):
            roles[name] = kind
        else:
            raise GraphError(
                f"recipe {function.__name__}: parameter {name!r} must be annotated with a source (Prompts, Examples, "
                f"Preferences), a role (Actor, Critic, ...), a State or a config dataclass, got {kind!r}"
            )
    return Recipe(
        function=function,
        name=function.__name__,
        file=Path(inspect.getfile(function)),
        sources=sources,
        roles=roles,
        states=states,
        config=config,
    )
