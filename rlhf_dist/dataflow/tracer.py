"""The record of one step as a recipe is traced: its nodes, under unique names and with the recipe's lines."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlhf_dist.dataflow.graph import ColumnOrigin, GraphError, Input, Node
from rlhf_dist.dataflow.op_settings import defaults
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.roles import ops_of
from rlhf_dist.schema import COLUMNS, ROW_IDS

if TYPE_CHECKING:
    from rlhf_dist.dataflow.traced_batch import TracedBatch

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
