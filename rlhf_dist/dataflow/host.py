"""Host ops: pure functions of batches that run on CPU processes, cut into shards by rows or groups.

    @host_op(reads=("rewards", "group_id"), writes=("advantages",), scope="groups")
    def grpo_advantage(batch: Batch, *, eps: float = 1e-6) -> Batch: ...

    @host_op(reads=(("response_ids",), ("response_ids", "weight")), writes=("novelty",), scope="batch")
    def novelty(batch: Batch, experts: Batch, *, rng: np.random.Generator) -> Batch: ...

The decorated function stays a plain function when it is called with a `Batch`. Called inside a recipe
with a traced or a live batch it becomes a node. `scope` says what a shard must hold whole:

    rows    any cut will do (row-wise formulas); of one batch only
    groups  rows of one group stay together (group baselines, pairs), in all of its batches
    batch   everything at once (whitening, global filters, what draws random numbers): one task

Shards are cut by row count, never by placement, so the result is the same wherever it runs. `rows` says what
becomes of the first batch's rows; a column that an op writes belongs to them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast, get_args

from rlhf_dist.batch import Batch, IntArray
from rlhf_dist.dataflow.op_settings import RANDOM, defaults
from rlhf_dist.metrics import Metrics
from rlhf_dist.roles import Columns

Scope = Literal["rows", "groups", "batch"]
HostRows = Literal["keep", "drop", "derive"]
"""All rows stay, some are dropped, or new ones are made of them."""
Reads = Columns | tuple[tuple[str, ...], ...]
"""Columns of the one batch, or a tuple of columns for each of several."""
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class HostResult:
    """What a host op returns when it returns more than columns."""

    columns: Batch
    """The written columns; as many rows as the op leaves."""
    keep: IntArray | None = None
    """[B'] rows="drop": the input rows that stay, in order. None: all stay."""
    parent: IntArray | None = None
    """[B'] rows="derive": the input row that each new row is made of, whose other columns it has too."""
    metrics: Metrics = field(default_factory=dict)

    def parent_for(self, op: str, rows: str) -> IntArray | None:
        """[B'] the input row of each row that `op` leaves, which does `rows` to them; None where all stay.

        Raises ValueError for an answer that such an op does not give.
        """
        for name, allowed in (("keep", "drop"), ("parent", "derive")):
            if getattr(self, name) is not None and rows != allowed:
                raise ValueError(f"{op} returned {name}=, which is for rows={allowed!r}; it has rows={rows!r}")
        if rows == "derive" and self.parent is None:
            raise ValueError(f"{op} has rows='derive' and returned no parent=: the input row of each new row")
        return self.keep if rows == "drop" else self.parent

    @property
    def groups(self) -> IntArray | None:
        """[B'] group ids of the rows, where they are written."""
        return self.columns["group_id"].values if "group_id" in self.columns else None


@dataclass(frozen=True)
class HostOp(Generic[P, R]):
    """A host op: the function and what it declares."""

    function: Callable[P, R]
    name: str
    reads: Reads
    writes: Columns
    scope: Scope | Callable[[Mapping[str, Any]], Scope]
    """What a shard must hold whole, or a function of the keyword arguments that says so."""
    rows: HostRows
    least_group: int | Callable[[Mapping[str, Any]], int] = 1
    """Fewest rows of one group that the op can tell anything from, or a function of the keyword arguments; a recipe
    that gives it fewer is refused."""
    copies: int | Callable[[Mapping[str, Any]], int] = 1
    """rows="derive": most rows made of each, for row counts before a run, or a function of the keyword arguments."""
    missing: bool = False
    """Whether it knows what to make of missing numbers (failed rewards, verdicts that could not be read)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and not isinstance(args[0], Batch) and hasattr(args[0], "apply_host_op"):
            return args[0].apply_host_op(self, args, kwargs)
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # The module's name now means this object, so pickle could not find the function behind it. Our own
        # ops travel by name; a user's op travels by value, since workers cannot import the user's file.
        if self.function.__module__.startswith("rlhf_dist."):
            return _import_op, (self.function.__module__, self.function.__qualname__)
        return HostOp, tuple(getattr(self, one.name) for one in fields(self))

    def read_of(self, kwargs: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
        """Columns read of each batch, for these arguments (a declaration may depend on them)."""
        reads = self.reads(kwargs) if callable(self.reads) else self.reads
        if reads and not isinstance(reads[0], str):
            return cast(tuple[tuple[str, ...], ...], reads)
        return (cast(tuple[str, ...], reads),)

    def written_for(self, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
        """Columns written, for these arguments."""
        return self.writes(kwargs) if callable(self.writes) else self.writes

    def scope_of(self, kwargs: Mapping[str, Any]) -> Scope:
        """What a shard must hold whole, for these arguments."""
        return self.scope(kwargs) if callable(self.scope) else self.scope

    def least_group_for(self, kwargs: Mapping[str, Any]) -> int:
        """Fewest rows of one group, for these arguments."""
        least = self.least_group
        return least({**defaults(self.function), **kwargs}) if callable(least) else least

    def copies_for(self, kwargs: Mapping[str, Any]) -> int:
        """Most rows made of each, for these arguments."""
        return self.copies({**defaults(self.function), **kwargs}) if callable(self.copies) else self.copies

    @property
    def draws(self) -> bool:
        """Whether it takes a random generator, seeded by the run's seed, the step and the node."""
        return RANDOM in inspect.signature(self.function).parameters


def host_op(
    *,
    reads: Reads,
    writes: Columns = (),
    scope: Scope | Callable[[Mapping[str, Any]], Scope] = "rows",
    rows: HostRows = "keep",
    least_group: int | Callable[[Mapping[str, Any]], int] = 1,
    copies: int | Callable[[Mapping[str, Any]], int] = 1,
    missing: bool = False,
) -> Callable[[Callable[P, R]], HostOp[P, R]]:
    """Declare a pure function `(batch, **settings) -> Batch | HostResult` as a host op.

    reads, writes: column names, or a function of the keyword arguments where they depend on them; a tuple of tuples
    where the function takes several batches. scope, copies and least_group may be functions, too. rows: with `drop` it
    returns a `HostResult` with `keep`, with `derive` one with `parent` (and at most `copies` rows of each).
    least_group: fewest rows of a group that the op makes sense for. missing: it takes missing numbers
    (`rlhf_dist.missing`); without, a run in which one reaches it ends with an error: NaN > 0.5 is False, so that a
    reward that nobody knows would count as a bad one. A function that has a parameter `rng` is given a generator, and
    needs scope="batch": what it draws must not depend on how rows are cut.

    Raises ValueError for a declaration that cannot be.
    """

    for what, names in (("reads", reads), ("writes", writes)):
        if isinstance(names, str):  # the comma of a tuple of one was left out, and a text is a sequence of letters
            raise ValueError(f"@host_op({what}=...) takes a tuple of names, got the text {names!r}; write ({names!r},)")
    if rows not in get_args(HostRows):
        raise ValueError(f"@host_op(rows=...) is one of {', '.join(get_args(HostRows))}, got {rows!r}")

    def wrap(function: Callable[P, R]) -> HostOp[P, R]:
        op = HostOp(function, function.__name__, reads, writes, scope, rows, least_group, copies, missing)
        object.__setattr__(op, "__doc__", function.__doc__)
        object.__setattr__(op, "__wrapped__", function)
        if op.draws and scope != "batch":
            raise ValueError(
                f'@host_op of {op.name}: what it draws (rng) must not depend on how rows are cut; set scope="batch"'
            )
        return op

    return wrap


def _import_op(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def as_result(returned: Batch | HostResult) -> HostResult:
    """Both things a host op may return, as one."""
    return returned if isinstance(returned, HostResult) else HostResult(columns=returned)
