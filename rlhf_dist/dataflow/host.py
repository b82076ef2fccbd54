"""Host ops: pure functions of a batch that run on CPU processes, cut into shards by rows or groups.

    @host_op(reads=("rewards", "group_id"), writes=("advantages",), scope="groups")
    def grpo_advantage(batch: Batch, *, eps: float = 1e-6) -> Batch: ...

The decorated function stays a plain function when it is called with a `Batch`. Called inside a recipe
with a traced or a live batch it becomes a node. `scope` says what a shard must hold whole:

    rows    any cut will do (row-wise formulas)
    groups  rows of one group stay together (group baselines, pairs)
    batch   everything at once (whitening, global filters): one task

Shards are cut by row count, never by placement, so the result is the same wherever it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, ParamSpec, TypeVar

from rlhf_dist.batch import Batch, IntArray
from rlhf_dist.metrics import Metrics
from rlhf_dist.roles import Columns

Scope = Literal["rows", "groups", "batch"]
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class HostResult:
    """What a host op returns when it returns more than columns."""

    columns: Batch
    """The written columns; as many rows as `keep` (or as the input, when keep is None)."""
    keep: IntArray | None = None
    """Row-dropping ops: the input rows that stay, in order. None: all stay."""
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class HostOp(Generic[P, R]):
    """A host op: the function and what it declares."""

    function: Callable[P, R]
    name: str
    reads: Columns
    writes: Columns
    scope: Scope | Callable[[Mapping[str, Any]], Scope]
    """What a shard must hold whole, or a function of the keyword arguments that says so."""
    drops_rows: bool
    least_group: int = 1
    """Fewest rows of one group that the op can tell anything from; a recipe that gives it fewer is refused."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and not isinstance(args[0], Batch) and hasattr(args[0], "apply_host_op"):
            return args[0].apply_host_op(self, args, kwargs)
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # The module's name now means this object, so pickle could not find the function behind it. Our own
        # ops travel by name; a user's op travels by value, since workers cannot import the user's file.
        if self.function.__module__.startswith("rlhf_dist."):
            return _import_op, (self.function.__module__, self.function.__qualname__)
        return HostOp, (
            self.function,
            self.name,
            self.reads,
            self.writes,
            self.scope,
            self.drops_rows,
            self.least_group,
        )

    def columns(self, which: Columns, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
        """Column names for these arguments (a declaration may depend on them)."""
        return which(kwargs) if callable(which) else which

    def scope_of(self, kwargs: Mapping[str, Any]) -> Scope:
        """What a shard must hold whole, for these arguments."""
        return self.scope(kwargs) if callable(self.scope) else self.scope


def host_op(
    *,
    reads: Columns,
    writes: Columns = (),
    scope: Scope | Callable[[Mapping[str, Any]], Scope] = "rows",
    drops_rows: bool = False,
    least_group: int = 1,
) -> Callable[[Callable[P, R]], HostOp[P, R]]:
    """Declare a pure function `(batch, **parameters) -> Batch | HostResult` as a host op.

    `reads` and `writes` are column names, or a function of the keyword arguments where they depend on
    them; `scope` may be one, too. `least_group`: fewest rows of a group the op makes sense for. With
    `drops_rows` the function returns a `HostResult` with `keep`.
    """

    for what, names in (("reads", reads), ("writes", writes)):
        if isinstance(names, str):  # the comma of a tuple of one was left out, and a text is a sequence of letters
            raise ValueError(f"@host_op({what}=...) takes a tuple of names, got the text {names!r}; write ({names!r},)")

    def wrap(function: Callable[P, R]) -> HostOp[P, R]:
        op = HostOp(function, function.__name__, reads, writes, scope, drops_rows, least_group)
        object.__setattr__(op, "__doc__", function.__doc__)
        object.__setattr__(op, "__wrapped__", function)
        return op

    return wrap


def _import_op(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def as_result(returned: Batch | HostResult) -> HostResult:
    """Both things a host op may return, as one."""
    return returned if isinstance(returned, HostResult) else HostResult(columns=returned)
