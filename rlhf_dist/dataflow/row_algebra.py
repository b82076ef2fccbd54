"""Rows moved by index: what a recipe does with whole batches. No data moves, only the controller's row indices.

join      columns of another batch, rows matched by group, row, parent or child
concat    rows of several batches, one after the other
where     the rows whose column is not 0, and the others: two batches
merge     what `where` parted, put together again in the old order
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self, cast, get_args

from rlhf_dist.batch import Batch
from rlhf_dist.dataflow.graph import ColumnOrigin, GraphError, Input, Node
from rlhf_dist.dataflow.host import HostResult, host_op

if TYPE_CHECKING:
    from rlhf_dist.dataflow.traced_batch import TracedBatch
    from rlhf_dist.dataflow.tracer import Tracer

Matching = Literal["group", "row", "parent", "child"]


@host_op(reads=lambda settings: (settings["column"],), rows="drop")
def rows_where(batch: Batch, *, column: str, holds: bool) -> HostResult:
    """The rows whose number in `column` is not 0 (holds=False: is 0)."""
    import numpy as np

    values = batch[column]
    if values.offsets is not None or values.values.ndim != 1:
        raise ValueError(f"where({column!r}) needs one number a row; {column!r} has several, or text")
    if not np.isfinite(values.values).all():
        raise ValueError(f"where({column!r}) found values that are not finite numbers; look at the op that wrote them")
    keep = np.flatnonzero((values.values != 0) == holds)
    return HostResult(columns=Batch({}, len(keep)), keep=keep)


class RowAlgebra:
    """The part of a traced batch that this file is about."""

    tracer: Tracer
    rows: str
    origins: Mapping[str, ColumnOrigin]
    per_group: int | None
    left_out: Mapping[str, str]

    def join(self, other: Self, *, on: Matching = "group", **new_from_old: str) -> Self:
        """Columns of `other` added as `new="old"`; each row here has exactly one there.

        on: rows match that have the same `group`; that are the same `row`; whose `parent` is the row there: what is
        known of a prompt, for each of its responses; or whose one `child` is the row there: a judge's answer about it.
        """
        line = self.tracer.line()
        if on not in get_args(Matching):
            raise GraphError(f"{line}: join matches rows on group, row, parent or child, got on={on!r}")
        if on == "group" and other.per_group not in (1, None):
            raise GraphError(
                f"{line}: join matches rows by group, and {other.rows} has {other.per_group} rows of each, so it is "
                'not said which; use on="row" or on="parent", or keep one row of a group first (best_of_group)'
            )
        node = self.tracer.add(
            Node(
                name="join",
                role="controller",
                op="join",
                kind="join",
                inputs=(
                    Input(rows=self.rows, columns={}),
                    Input(
                        rows=other.rows,
                        columns=self.tracer.read("join", cast("TracedBatch", other), tuple(new_from_old.values())),
                    ),
                ),
                writes=tuple(new_from_old),
                out={old: new for new, old in new_from_old.items()},
                kwargs={"on": on},
                line=line,
            )
        )
        written = {name: ColumnOrigin(node.name, name) for name in node.writes}
        return replace(self, origins={**self.origins, **written})  # type: ignore[type-var]

    def concat(self, *others: Self) -> Self:
        """The rows of this batch and of `others`, one batch after the other, with the columns that all of them have.

        Rows of one group stay one group, and keep their ids.
        """
        return self._put_together("concat", (self, *others), ordered=False)

    def merge(self, *others: Self) -> Self:
        """As `concat`, rows in the order in which they were made: what `where` parted is as it was before."""
        return self._put_together("merge", (self, *others), ordered=True)

    def where(self, column: str) -> tuple[Self, Self]:
        """The rows whose number in `column` is not 0, and those where it is; either may be empty at a step."""
        yes: Self = rows_where(self, column=column, holds=True)
        no: Self = rows_where(self, column=column, holds=False)
        return yes, no

    def _put_together(self, op: str, batches: Sequence[Self], *, ordered: bool) -> Self:
        line = self.tracer.line()
        for batch in batches:
            if not isinstance(batch, RowAlgebra):
                raise GraphError(f"{line}: {op} takes batches, got {type(batch).__name__}")
        common = [name for name in self.origins if all(name in batch.origins for batch in batches)]
        node = self.tracer.add(
            Node(
                name=op,
                role="controller",
                op=op,
                kind="concat",
                inputs=tuple(
                    Input(rows=batch.rows, columns={}, carried={name: batch.origins[name] for name in common})
                    for batch in batches
                ),
                rows="derive",
                kwargs={"ordered": ordered},
                line=line,
            )
        )
        only = {name for batch in batches for name in batch.origins} - set(common)
        left = {name: f"{node.name} ({line}) left it out: not all of its batches have it" for name in only}
        return replace(  # type: ignore[type-var]
            self,
            rows=node.name,
            origins={name: ColumnOrigin(node.name, name) for name in common},
            per_group=None,
            left_out={**self.left_out, **left},
        )
