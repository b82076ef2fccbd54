"""Tracing: call a recipe with handles that record instead of compute.

Every handle holds, per column, which node wrote it; an op looks up the origins of the columns it
reads, so edges come out per column although the text reads as a sequence. Nothing is executed here:
`on_node` is called with each node as it is recorded, and a live run (`controller/execution/eager.py`) executes
it there and then. That is the whole difference between the two ways to run a recipe.
"""

from __future__ import annotations

import difflib
import inspect
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from io import StringIO
from types import MappingProxyType
from typing import Any, NoReturn, cast

import numpy as np

from rlhf_dist.dataflow.generation_calls import generation_settings
from rlhf_dist.dataflow.graph import ColumnOrigin, Dataflow, GraphError, Input, Kind, Node
from rlhf_dist.dataflow.host import HostOp
from rlhf_dist.dataflow.op_settings import (
    check_heads,
    check_known,
    check_loss,
    check_settings,
    defaults,
    output_names,
    terms_of,
)
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.dataflow.refill import source_node
from rlhf_dist.dataflow.row_algebra import RowAlgebra
from rlhf_dist.dataflow.row_facts import (
    check_written,
    rows_of_item,
    rows_per_group,
    stale_columns,
    with_token_ids,
)
from rlhf_dist.dataflow.state_value import states_read, value_of
from rlhf_dist.dataflow.weight_ops import WeightRole, check_sets, record_weights
from rlhf_dist.roles import OpSpec, RowEffect, State, base_of, ops_of
from rlhf_dist.schema import COLUMNS, ROW_IDS
from rlhf_dist.weights import WeightOp, weight_ops_of

OnNode = Callable[[Node], None]
Fetch = Callable[[str, str], Any]
"""(node, column) -> the rows' values; only a live run has one."""


class Tracer:
    """Collects the nodes of one step."""

    def __init__(
        self,
        recipe: Recipe,
        on_node: OnNode | None = None,
        fetch: Fetch | None = None,
        refilled: Collection[str] = (),
    ) -> None:
        """refilled: sources that are drawn from more than once in a step, as an earlier trace found."""
        self.recipe = recipe
        self.nodes: list[Node] = []
        self.refilled = set(refilled)
        self._on_node = on_node
        self.fetch = fetch

    def add(self, node: Node) -> Node:
        """Record `node` under a unique name."""
        taken = sum(other.name.split("#")[0] == node.name for other in self.nodes)
        if taken:
            node = replace(node, name=f"{node.name}#{taken + 1}")
        node = replace(node, place=len(self.nodes))
        self.nodes.append(node)
        if self._on_node:
            self._on_node(node)
        return node

    def line(self) -> str:
        """`ppo.py:31`, the recipe's line that is being traced; the caller's line outside of the recipe's file."""
        frame: Any = sys._getframe(1)
        here = str(self.recipe.file)
        while frame and frame.f_code.co_filename != here:
            frame = frame.f_back
        return f"{self.recipe.file.name}:{frame.f_lineno}" if frame else self.recipe.file.name

    def read(self, op: str, batch: TracedBatch, names: tuple[str, ...]) -> Mapping[str, ColumnOrigin]:
        """Origins of `names`. Raises GraphError naming op, line, what is there and what would write it."""
        missing = [name for name in names if name not in batch.origins and name not in ROW_IDS]
        if missing:
            raise GraphError(self._missing(op, batch, missing[0]))
        return {name: batch.origins[name] for name in names if name not in ROW_IDS}

    def input(self, op: str, batch: TracedBatch, names: tuple[str, ...], *, carries: bool = False) -> Input:
        """What a node reads of `batch`. carries: it makes rows, which have the batch's other columns, too."""
        read = self.read(op, batch, names)
        carried = {name: at for name, at in batch.origins.items() if name not in read} if carries else {}
        return Input(
            rows=batch.rows, columns=read, carried=carried, ids=tuple(name for name in names if name in ROW_IDS)
        )

    def _missing(self, op: str, batch: TracedBatch, name: str) -> str:
        writers = [
            f"{role}.{spec.name}"
            for role, interface in self.recipe.roles.items()
            for spec in ops_of(interface).values()
            if name in spec.columns(spec.writes, defaults(getattr(interface, spec.name)))
        ]
        meaning = f" ({COLUMNS[name].meaning})" if name in COLUMNS else ""
        hint = f"; {' or '.join(writers)} would write it" if writers else ""
        near = difflib.get_close_matches(name, batch.origins, n=1)
        hint += f"; did you mean {near[0]!r}?" if near and not writers else ""
        hint += f"; {batch.left_out[name]}" if name in batch.left_out else ""
        return (
            f"{self.line()}: {op} reads column {name!r}{meaning}, which the batch does not have; "
            f"it has {', '.join(sorted(batch.origins))}{hint}"
        )


@dataclass(frozen=True, eq=False)
class TracedBatch(RowAlgebra):
    """A batch in a recipe: for each column, the node that wrote it. Holds no data."""

    tracer: Tracer
    rows: str
    """The node that made the rows."""
    origins: Mapping[str, ColumnOrigin]
    per_group: int | None = None
    """Rows of a group, where every group has as many; None where that is not known before a run."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Columns that it would have, had they not been left out -> what did, for errors."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns at this point of the recipe."""
        return tuple(self.origins)

    def select(self, *names: str) -> TracedBatch:
        """Only these columns; no data moves."""
        return replace(self, origins=self.tracer.read("select", self, names))

    def drop(self, *names: str) -> TracedBatch:
        """All but these columns; no data moves."""
        return replace(self, origins={name: at for name, at in self.origins.items() if name not in names})

    def rename(self, **new_from_old: str) -> TracedBatch:
        """Columns under new names, as `new="old"`; no data moves."""
        taken = self.tracer.read("rename", self, tuple(new_from_old.values()))
        kept = {name: at for name, at in self.origins.items() if name not in taken and name not in new_from_old}
        return replace(self, origins={**kept, **{new: taken[old] for new, old in new_from_old.items()}})

    def with_columns_of(self, other: TracedBatch, **new_from_old: str) -> TracedBatch:
        """Columns of `other`, a batch with these same rows, added as `new="old"`; no data moves."""
        if other.rows != self.rows:
            raise GraphError(
                f"{self.tracer.line()}: with_columns_of needs batches with the same rows; these come from "
                f"{self.rows} and {other.rows}; use join(), which matches rows by group"
            )
        taken = self.tracer.read("with_columns_of", other, tuple(new_from_old.values()))
        return replace(self, origins={**self.origins, **{new: taken[old] for new, old in new_from_old.items()}})

    def apply_host_op(self, host_op: HostOp[Any, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TracedBatch:
        """Record a host op (see `rlhf_dist/dataflow/host.py`)."""
        line = self.tracer.line()
        check_settings(line, host_op.name, host_op.function, kwargs)
        settings = {**defaults(host_op.function), **kwargs}
        reads = host_op.read_of(settings)
        if len(args) != len(reads) or not all(isinstance(batch, TracedBatch) for batch in args):
            got = ", ".join(type(one).__name__ for one in args)
            read = " | ".join(", ".join(names) for names in reads)
            raise GraphError(
                f"{line}: {host_op.name} takes {len(reads)} batch{'es' if len(reads) > 1 else ''} and keyword "
                f"settings, got {len(args)} positional arguments ({got}); it reads {read}"
            )
        if len(args) > 1 and host_op.scope_of(settings) == "rows":
            raise GraphError(
                f'{line}: {host_op.name} takes {len(args)} batches, whose rows need not match, with scope="rows"; set '
                'it to "groups" or "batch"'
            )
        return self._record(
            name=host_op.name,
            role="host",
            op=host_op.name,
            kind="host",
            batches=list(zip(args, reads, strict=True)),
            writes=host_op.written_for(settings),
            rows=host_op.rows,
            kwargs=kwargs,
            spec=host_op,
        )

    def _record(
        self,
        *,
        name: str,
        role: str,
        op: str,
        kind: Kind,
        batches: Sequence[tuple[TracedBatch, tuple[str, ...]]],
        writes: tuple[str, ...],
        rows: RowEffect,
        kwargs: Mapping[str, Any],
        spec: Any,
        weights_read: tuple[str, ...] = (),
        weights_written: tuple[str, ...] = (),
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> TracedBatch:
        """Record a node that reads these columns of `batches`, this one first; returns this batch after it.

        names: see OpSpec.
        """
        kwargs, line = dict(kwargs), self.tracer.line()
        check_known(line, name, kwargs)
        out = output_names(line, kwargs.pop("out", None), writes, name)
        every, after = int(kwargs.pop("every", 1)), int(kwargs.pop("after", 0))
        if (every != 1 or after) and writes:
            raise GraphError(
                f"{line}: {name} writes {', '.join(writes)}, which later nodes may read every step; "
                f"every= and after= are for updates"
            )
        written = tuple(out.get(column, column) for column in writes)
        check_written(line, name, written)
        if batches:
            batches = [(self, with_token_ids(batches[0][1], written, self.origins)), *batches[1:]]
        inside = {column: own for own, column in names.items()}
        node = Node(
            name=name,
            role=role,
            op=op,
            kind=kind,
            inputs=tuple(
                self.tracer.input(name, batch, columns, carries=k == 0 and rows != "keep")
                for k, (batch, columns) in enumerate(batches)
            ),
            writes=written,
            out={**names, **{inside.get(column, column): new for column, new in out.items()}},
            rows=rows,
            weights_read=(*weights_read, *(f"{state}.state" for state in states_read(kwargs))),
            weights_written=weights_written,
            kwargs=kwargs,
            spec=spec,
            line=line,
            every=every,
            after=after,
        )
        return self._after(self.tracer.add(node))

    def _after(self, node: Node) -> TracedBatch:
        """This batch once `node` has run, which reads it first."""
        written = {name: ColumnOrigin(node.name, name) for name in node.writes}
        stale = stale_columns(node.writes, self.origins)
        left_out = {name: f"{node.name} ({node.line}) changed the tokens that it belonged to" for name in stale}
        kept = {name: at for name, at in self.origins.items() if name not in stale}
        if node.rows != "keep":
            kept = {name: ColumnOrigin(node.name, name) for name in kept}
        return replace(
            self,
            rows=self.rows if node.rows == "keep" else node.name,
            origins={**kept, **written},
            per_group=rows_per_group(node, self.per_group),
            left_out={**self.left_out, **left_out},
        )

    def fetch(self, name: str) -> Any:
        """The rows of a column, in a live run (`rlhf-dist run RECIPE --eager`); for looking, not for computing."""
        if self.tracer.fetch is None:
            self._no_data(f"fetching column {name!r}", "run with --eager to look at data, or write a host op")
        origin = self.tracer.read("fetch", self, (name,))[name]
        return self.tracer.fetch(origin.node, origin.column)

    # --- what a traced batch cannot do -------------------------------------------------------------
    def _no_data(self, what: str, instead: str) -> NoReturn:
        raise GraphError(
            f"{self.tracer.line()}: {what} needs the batch's data, but a recipe is traced before there is any; "
            f"{instead}"
        )

    def __bool__(self) -> bool:
        self._no_data("a condition on a batch", "drop rows in a host op (drops_rows=True), or decide on cfg or a State")

    def __iter__(self) -> Any:
        self._no_data("iterating over a batch", "write a host op (rlhf_dist.dataflow.host_op) that sees the rows")

    def __len__(self) -> int:
        self._no_data("len() of a batch", "row counts may change at run time; a host op sees batch.num_rows")

    def __getitem__(self, name: str) -> Any:
        self._no_data(f"reading column {name!r}", "write a host op (rlhf_dist.dataflow.host_op) that reads it")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copy, pickle and people's displays ask of every object
            raise AttributeError(name)
        near = difflib.get_close_matches(name, [n for n in dir(TracedBatch) if not n.startswith("_")], n=1)
        instead = f"did you mean {near[0]}()?" if near else "write a host op (rlhf_dist.dataflow.host_op) that sees it"
        self._no_data(f"batch.{name}", instead)

    def item(self) -> Any:
        """Not possible on a traced batch."""
        self._no_data(".item()", "compute the number in a host op and report it as a metric, or keep it in a State")


class RoleHandle:
    """A role in a recipe: its ops record nodes."""

    def __init__(self, tracer: Tracer, role: str, interface: type) -> None:
        self._tracer, self._role, self._interface = tracer, role, interface
        self._ops, self._weight_ops = ops_of(interface), weight_ops_of(interface)

    def weight_role(self) -> WeightRole:
        """This role, for another one that takes its weights."""
        return WeightRole(self._role, self._interface)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._weight_ops:
            return self._weights_call(self._weight_ops[name])
        if name not in self._ops:
            near = difflib.get_close_matches(name, [*self._ops, *self._weight_ops], n=1)
            raise GraphError(
                f"{self._tracer.line()}: {self._interface.__name__} {self._role!r} has no op {name!r}; "
                f"it has {', '.join(self._ops)}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        spec = self._ops[name]

        def call(batch: TracedBatch, **kwargs: Any) -> TracedBatch:
            return self._call(spec, batch, kwargs)

        return call

    def _weights_call(self, spec: WeightOp) -> Callable[..., None]:
        def call(*given: Any, **kwargs: Any) -> None:
            record_weights(self._tracer, self.weight_role(), spec, given, kwargs)

        return call

    def _call(self, spec: OpSpec, batch: TracedBatch, kwargs: dict[str, Any]) -> TracedBatch:
        where, line = f"{self._role}.{spec.name}", self._tracer.line()
        function = getattr(self._interface, spec.name)
        if isinstance(batch, list | tuple):
            return self._update(spec, where, terms_of(line, where, function, batch, kwargs, TracedBatch), kwargs)
        if not isinstance(batch, TracedBatch):
            raise GraphError(f"{line}: {where} takes a batch first, got {type(batch).__name__}")
        check_settings(line, where, function, kwargs)
        settings = {**defaults(function), **kwargs}
        if "loss" in settings:
            self._check_loss(spec, where, settings["loss"])
        check_heads(line, where, settings, self._interface)
        settings, lenders = generation_settings(line, where, batch, settings)
        return self._record(spec, where, [(batch, self._reads(spec, batch, settings))], settings, lenders)

    def _update(
        self, spec: OpSpec, where: str, terms: list[tuple[TracedBatch, Any, Any]], kwargs: dict[str, Any]
    ) -> TracedBatch:
        line, function = self._tracer.line(), getattr(self._interface, spec.name)
        settings = {**defaults(function), **kwargs}
        batches = []
        for batch, loss, _ in terms:
            check_settings(line, where, function, {**kwargs, "loss": loss})
            self._check_loss(spec, where, loss)
            batches.append((batch, self._reads(spec, batch, {**settings, "loss": loss})))
        return self._record(spec, where, batches, {**settings, "terms": tuple((loss, w) for _, loss, w in terms)})

    def _check_loss(self, spec: OpSpec, where: str, loss: Any) -> None:
        teachers = [role for role, kind in self._tracer.recipe.roles.items() if hasattr(kind, "compute_top_k")]
        check_loss(self._tracer.line(), where, loss, spec.outputs, getattr(self._interface, "heads", ()), teachers)

    def _reads(self, spec: OpSpec, batch: TracedBatch, settings: Mapping[str, Any]) -> tuple[str, ...]:
        more = dict.fromkeys((*spec.optional, *self._tracer.recipe.reads.get(self._role, ())))
        needed = spec.columns(spec.reads, settings)
        return (*needed, *(name for name in more if name in batch.origins and name not in needed))

    def _record(
        self,
        spec: OpSpec,
        where: str,
        batches: list[tuple[TracedBatch, tuple[str, ...]]],
        settings: Mapping[str, Any],
        lenders: tuple[str, ...] = (),
    ) -> TracedBatch:
        """lenders: other roles whose generation weights it reads."""
        return batches[0][0]._record(
            name=where,
            role=self._role,
            op=spec.name,
            kind="op",
            batches=batches,
            writes=spec.columns(spec.writes, settings),
            rows=spec.rows,
            kwargs=settings,
            spec=spec,
            weights_read=tuple(f"{role}.{spec.weights_read}" for role in (self._role, *lenders) if spec.weights_read),
            weights_written=(f"{self._role}.{spec.weights_written}",) if spec.weights_written else (),
            names=spec.names,
        )


class StateHandle:
    """A `State` in a recipe: `value(key)` for a number, its `state_op` methods."""

    def __init__(self, tracer: Tracer, role: str, kind: type[State], cfg: Any) -> None:
        self._tracer, self._role, self._kind = tracer, role, kind
        self._ops = ops_of(kind)
        try:
            initial = kind().initial(cfg)
            self._first: dict[str, float] = {key: one for key, one in initial.items() if isinstance(one, int | float)}
        except Exception as error:  # the user's own code
            raise GraphError(
                f"{tracer.recipe.file.name}: {kind.__name__}.initial, which gives {role!r} its numbers at the start, "
                f"raised {type(error).__name__}: {error}"
            ) from error

    def value(self, key: str) -> float:
        """Stands for the number `key` wherever an op takes one, in a loss too; see `state_value.py`."""
        if key not in self._first:
            near = difflib.get_close_matches(str(key), self._first, n=1)
            raise GraphError(
                f"{self._tracer.line()}: {self._kind.__name__} {self._role!r} starts without a number {key!r}; it has "
                f"{', '.join(self._first) or 'none'}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        return cast(float, value_of(self._role, key, self._first[key], self._tracer.line))

    def __getattr__(self, name: str) -> Callable[..., TracedBatch]:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._ops:
            near = difflib.get_close_matches(name, self._ops, n=1)
            raise GraphError(
                f"{self._tracer.line()}: {self._kind.__name__} {self._role!r} has no op {name!r}; it has "
                f"{', '.join(self._ops) or 'none'}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        spec = self._ops[name]

        def call(*batches: TracedBatch, **kwargs: Any) -> TracedBatch:
            return self._call(spec, batches, kwargs)

        return call

    def _call(self, spec: OpSpec, batches: tuple[TracedBatch, ...], kwargs: dict[str, Any]) -> TracedBatch:
        where, line = f"{self._role}.{spec.name}", self._tracer.line()
        takes = 0 if spec.rows == "new" else 1
        if len(batches) != takes or not all(isinstance(batch, TracedBatch) for batch in batches):
            got = ", ".join(type(one).__name__ for one in batches) or "none"
            raise GraphError(f"{line}: {where} takes {'one batch' if takes else 'no batch'} first, got {got}")
        function = getattr(self._kind, spec.name)
        check_settings(line, where, function, kwargs)
        settings = {**defaults(function), **kwargs}
        batch = batches[0] if batches else TracedBatch(self._tracer, "", {})
        return batch._record(
            name=where,
            role=self._role,
            op=spec.name,
            kind="state",
            batches=[(batch, spec.columns(spec.reads, settings))] if batches else [],
            writes=spec.columns(spec.writes, settings),
            rows=spec.rows,
            kwargs=settings,
            spec=spec,
            weights_read=(f"{self._role}.state",),
            weights_written=(f"{self._role}.state",),
        )


def run_traced(
    recipe: Recipe,
    cfg: Any,
    on_node: OnNode | None = None,
    fetch: Fetch | None = None,
    refilled: Collection[str] = (),
) -> Tracer:
    """Call `recipe` with handles; `on_node` sees each node as it is recorded (a live run executes it there).

    refilled: see Tracer.
    """
    tracer = Tracer(recipe, on_node, fetch, refilled)
    arguments: dict[str, Any] = {}
    for name in recipe.sources:
        line = f"{recipe.file.name}:{recipe.function.__code__.co_firstlineno}"
        node = tracer.add(source_node(recipe, name, line, counted=name in tracer.refilled))
        origins = {column: ColumnOrigin(name, column) for column in node.writes}
        arguments[name] = TracedBatch(tracer, name, origins, per_group=rows_of_item(recipe, name))
    arguments |= {name: RoleHandle(tracer, name, kind) for name, kind in recipe.roles.items()}
    arguments |= {name: StateHandle(tracer, name, kind, cfg) for name, kind in recipe.states.items()}
    for name in inspect.signature(recipe.function).parameters:
        if name not in arguments:
            arguments[name] = cfg
    recipe.function(**arguments)
    return tracer


def _traced(recipe: Recipe, cfg: Any, refilled: Collection[str]) -> Tracer:
    return _rehearsed(recipe, cfg, refilled) if _rehearsing.get() else run_traced(recipe, cfg, refilled=refilled)


_rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)


@contextmanager
def rehearsal() -> Iterator[None]:
    """Recipes traced inside will be called line by line later (`--eager`), and may look at their data.

    While they are traced there is none: `fetch` gives one made-up row, `breakpoint()` does not stop, and what
    they print is not shown.
    """
    token = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(token)


def _rehearsed(recipe: Recipe, cfg: Any, refilled: Collection[str]) -> Tracer:
    hook, sys.breakpointhook = sys.breakpointhook, lambda *args, **kwargs: None
    try:
        with redirect_stdout(StringIO()):
            return run_traced(recipe, cfg, fetch=_made_up, refilled=refilled)
    finally:
        sys.breakpointhook = hook


def _made_up(node: str, column: str) -> Any:
    """One row of a column's kind; a user's own column is a number."""
    spec = COLUMNS.get(column)
    if spec is not None and spec.dtype == "text":
        return [""]
    zeros = np.zeros(1, spec.dtype if spec is not None else "float32")
    return [zeros if spec is not None and spec.shape != "[B]" else zeros[0]]


def trace(recipe: Recipe, cfg: Any = None) -> Dataflow:
    """The recipe's graph for settings `cfg` (default: the recipe's own defaults), reshard nodes inserted.

    Raises GraphError for a column nobody wrote, an unknown op or setting, a condition on data, or a ValueError.
    """
    from rlhf_dist.dataflow.passes import insert_reshard

    if cfg is None and recipe.config is not None:
        cfg = recipe.config()
    try:
        tracer = _traced(recipe, cfg, ())
        if tracer.refilled:  # how their first rows are drawn is known once the recipe has been read to its end
            tracer = _traced(recipe, cfg, tracer.refilled)
    except GraphError:
        raise
    except ValueError as error:  # of something that the recipe makes: a loss with a setting out of range
        lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == str(recipe.file)]
        raise GraphError(f"{recipe.file.name}:{lines[-1]}: {error}" if lines else str(error)) from error
    check_sets(tracer.nodes)
    interfaces = {**recipe.sources, **recipe.roles, **recipe.states}
    roles = {name: kind.__name__ for name, kind in interfaces.items()}
    bases = {name: base.__name__ for name, kind in recipe.roles.items() if (base := base_of(kind)) is not None}
    return insert_reshard(Dataflow(name=recipe.name, nodes=tuple(tracer.nodes), roles=roles, bases=bases))


__all__ = ["RoleHandle", "StateHandle", "TracedBatch", "Tracer", "rehearsal", "run_traced", "trace"]
