"""The batch that a recipe handles: for each column the node that wrote it, and an error for whatever needs data."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from rlhf_dist.dataflow.graph import ColumnOrigin, GraphError, Kind, Node
from rlhf_dist.dataflow.host import HostOp
from rlhf_dist.dataflow.op_settings import (
    check_known,
    check_settings,
    defaults,
    output_names,
)
from rlhf_dist.dataflow.row_algebra import RowAlgebra
from rlhf_dist.dataflow.row_facts import (
    check_written,
    rows_per_group,
    stale_columns,
    with_token_ids,
)
from rlhf_dist.dataflow.state_value import states_read
from rlhf_dist.roles import RowEffect

if TYPE_CHECKING:
    from rlhf_dist.dataflow.tracer import Tracer


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
