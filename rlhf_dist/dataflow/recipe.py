"""A recipe: a function over roles. Its parameter list is the role list; no critic parameter, no critic process.

    @recipe
    def ppo(prompts: Prompts, actor: Actor, critic: Critic, reference: Reference, reward: Reward, cfg: PPO): ...

Parameters are told apart by their annotation: a source (`Prompts`, `Examples`, `Preferences`, plain
`Batch`), a role interface, a `State`, and `cfg` with the recipe's own frozen dataclass.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, cast

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


def recipe(function: Callable[..., None]) -> Recipe:
    """Make a recipe of a function. Raises GraphError for a parameter whose type says nothing."""
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
