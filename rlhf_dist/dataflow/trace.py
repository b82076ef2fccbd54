"""Tracing: call a recipe with handles that record instead of compute.

Every handle holds, per column, which node wrote it; an op looks up the origins of the columns it
reads, so edges come out per column although the text reads as a sequence. Nothing is executed here:
`on_node` is called with each node as it is recorded, and a live run (`controller/execution/eager.py`) executes
it there and then. That is the whole difference between the two ways to run a recipe.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np

from rlhf_dist.dataflow.graph import ColumnOrigin, Dataflow, GraphError, Node
from rlhf_dist.dataflow.handles import RoleHandle, StateHandle
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.dataflow.refill import source_node
from rlhf_dist.dataflow.row_facts import rows_of_item
from rlhf_dist.dataflow.traced_batch import TracedBatch
from rlhf_dist.dataflow.tracer import Fetch, OnNode, Tracer
from rlhf_dist.dataflow.weight_ops import check_sets
from rlhf_dist.roles import base_of
from rlhf_dist.schema import COLUMNS


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
    beside = () if recipe.evaluation is None else _evaluation(recipe.evaluation, cfg, recipe.reads)
    return insert_reshard(
        Dataflow(name=recipe.name, nodes=tuple(tracer.nodes), roles=roles, bases=bases, beside=beside)
    )


def _evaluation(evaluation: Recipe, cfg: Any, reads: Mapping[str, tuple[str, ...]]) -> tuple[Node, ...]:
    nodes = trace(replace(evaluation, reads=reads), cfg if evaluation.config is not None else None).nodes
    for node in nodes:
        if node.weights_written:
            raise GraphError(f"{node.line}: {node.name} changes weights, and an evaluation only measures; leave it out")
    return nodes
