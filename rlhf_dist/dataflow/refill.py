"""Dynamic sampling as a bounded loop in the graph: draw, try, keep; draw more while too little was kept.

    def attempt(prompts):
        batch = reward.compute_reward(actor.generate_sequences(prompts, n=8))
        return drop_equal_groups(batch)

    batch = refill(prompts, attempt, groups=32, rounds=4)

    prompts --> attempt --> kept ----------------------------------+
                             | enough?                              v
    prompts#2 <--------------+  --> attempt --> kept --> ...  --> refill: the first `groups` groups

`attempt` is traced once for each round, so its nodes are nodes like all others. A later round draws no rows once
enough groups were kept, and its ops pass over nothing. The first `groups` groups in the order of rounds and rows are
the result; what exceeds them is dropped and counted. How far the source has been drawn is a number that the
controller keeps and checkpoints, since it is no longer the same for every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from rlhf_dist.dataflow.graph import ColumnOrigin, GraphError, Input, Node
from rlhf_dist.dataflow.recipe import Recipe

if TYPE_CHECKING:
    from rlhf_dist.dataflow.traced_batch import TracedBatch

Short = Literal["stop", "train"]


def refill(
    prompts: TracedBatch,
    attempt: Callable[[TracedBatch], TracedBatch],
    *,
    groups: int,
    rounds: int = 4,
    short: Short = "stop",
) -> TracedBatch:
    """`groups` groups of what `attempt` keeps of `prompts`, drawing prompts anew up to `rounds` times in all.

    prompts: a source parameter of the recipe, as it is. short: what becomes of a step for which all rounds kept fewer:
    `stop` ends the run, saying how many each round kept; `train` goes on with those.

    Raises GraphError for prompts that are no source's, an attempt that returns no batch, or counts that cannot be.
    """
    tracer = prompts.tracer
    line = tracer.line()
    source = next((node for node in tracer.nodes if node.name == prompts.rows), None)
    if source is None or source.kind != "source" or source.name != source.role:
        raise GraphError(
            f"{line}: refill draws again from a source; its first argument is a source parameter, as it is"
        )
    for name, value in (("groups", groups), ("rounds", rounds)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise GraphError(f"{line}: refill needs {name} >= 1 before it runs, got {value!r}")
    if short not in ("stop", "train"):
        raise GraphError(f"{line}: refill's short= is 'stop' or 'train', got {short!r}")
    tracer.refilled.add(source.role)
    kept: list[TracedBatch] = []
    batch = prompts
    for number in range(rounds):
        if number:
            gate = tuple(Input(rows=one.rows, columns={}) for one in kept)
            again = replace(
                source_node(tracer.recipe, source.role, line, counted=True), inputs=gate, kwargs={"until": groups}
            )
            node = tracer.add(again)
            batch = replace(prompts, rows=node.name, origins={c: ColumnOrigin(node.name, c) for c in prompts.origins})
        result = attempt(batch)
        if getattr(result, "tracer", None) is not tracer:
            raise GraphError(f"{line}: refill's attempt must return a batch, got {type(result).__name__}")
        kept.append(result)
    first = kept[0]
    node = tracer.add(
        Node(
            name="refill",
            role="controller",
            op="refill",
            kind="refill",
            inputs=tuple(Input(rows=one.rows, columns={}, carried=one.origins) for one in kept),
            rows="derive",
            kwargs={"groups": groups, "short": short},
            line=line,
        )
    )
    return replace(first, rows=node.name, origins={name: ColumnOrigin(node.name, name) for name in first.origins})


def source_node(recipe: Recipe, name: str, line: str, *, counted: bool) -> Node:
    """The node that draws rows of source `name`. counted: from where the last one ended, whatever the step."""
    drawn = (f"{name}.drawn",) if counted else ()
    return Node(
        name=name,
        role=name,
        op="next_batch",
        kind="source",
        writes=recipe.source_columns[name],
        rows="new",
        weights_read=drawn,
        weights_written=drawn,
        line=line,
    )
