"""What a recipe's text says about rows before there are any: how many a group has, which columns an op makes stale."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlhf_dist.dataflow.graph import Dataflow, GraphError, Node
from rlhf_dist.dataflow.host import HostOp
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.schema import COLUMNS, ROW_IDS, SEQUENCE


@dataclass(frozen=True)
class Amount:
    """Rows of a node in one step; for an update with several terms, of all of them together."""

    rows: int
    """At most."""
    groups: int
    """At most; for an update, of the term that has fewest."""
    exact: bool
    """Whether there are always as many."""


def amounts(dataflow: Dataflow, items: Mapping[str, int]) -> dict[str, Amount]:
    """Node -> its rows in a step. items: source -> items of a step (prompts, or pairs). Nodes without rows have 0."""
    found: dict[str, Amount] = {}
    for node in dataflow:
        before = [found[batch.rows] for batch in node.inputs]
        if node.kind == "source":
            count = items[node.role]
            found[node.name] = Amount(count * (2 if "label" in node.writes else 1), count, not node.inputs)
        elif not before:
            found[node.name] = Amount(0, 0, True)
        elif node.kind == "refill":
            found[node.name] = _refilled(dataflow, node, found)
        elif node.kind == "concat" or "terms" in node.kwargs:
            found[node.name] = _together(dataflow, node, found)
        else:
            copies = _asked(node) if node.rows == "expand" else _copies(node)
            begun = _begun(node, before[0])
            rows = begun.rows * (copies if node.rows in ("expand", "derive") else 1)
            exact = before[0].exact and node.rows not in ("drop", "derive") and not getattr(node.spec, "loses", False)
            found[node.name] = replace(begun, rows=rows, exact=exact)
    return found


def _begun(node: Node, before: Amount) -> Amount:
    """What is before a node, of which it makes its own rows: where it over-samples, as much as it keeps of that."""
    groups = node.kwargs.get("groups") if node.rows == "expand" else None
    if groups is None:
        return before
    return replace(before, rows=min(before.rows, groups), groups=min(before.groups, groups))


def _leaves(node: Node) -> int:
    """Most rows of one episode; 1 where responses are generated."""
    leaves: int = getattr(node.kwargs.get("environment"), "leaves", 1)
    return leaves


def _copies(node: Node) -> int:
    return node.spec.copies_for(node.kwargs) if isinstance(node.spec, HostOp) else 1


def _asked(node: Node) -> Any:
    """Rows asked for of each: of an episode its leaves, or one for each of those whose rows are kept."""
    return node.kwargs.get("n", 1) * max(_leaves(node), 1 + len(node.kwargs.get("rows_of", ())))


def _refilled(dataflow: Dataflow, node: Node, found: Mapping[str, Amount]) -> Amount:
    first, groups = found[node.inputs[0].rows], node.kwargs["groups"]
    return Amount(-(-first.rows // max(first.groups, 1)) * groups, groups, node.kwargs["short"] == "stop")


def _together(dataflow: Dataflow, node: Node, found: Mapping[str, Amount]) -> Amount:
    parts = [found[batch.rows] for batch in node.inputs]
    rows, exact = sum(part.rows for part in parts), all(part.exact for part in parts)
    if node.kind != "concat":
        return Amount(rows, min(part.groups for part in parts), exact)
    makers = {_maker(dataflow, batch.rows) for batch in node.inputs}
    if node.kwargs["ordered"] and len(makers) == 1:  # parts of the same rows
        return replace(found[makers.pop()], exact=False)
    return Amount(rows, sum(part.groups for part in parts), exact)


def _maker(dataflow: Dataflow, rows: str) -> str:
    """The node whose rows those of `rows` are some of."""
    while dataflow[rows].rows == "drop":
        rows = dataflow[rows].inputs[0].rows
    return rows


def rows_of_item(recipe: Recipe, source: str) -> int:
    """Rows of a group as a source gives them: a pair is two."""
    return 2 if "label" in recipe.source_columns[source] else 1


def rows_per_group(node: Node, before: int | None) -> int | None:
    """Rows of every group after `node`, of `before` before it; None where that is not known before a run."""
    if node.rows == "keep" or before is None:
        return before
    if node.rows == "expand":
        n = _asked(node)
        return before * n if isinstance(n, int) and _leaves(node) == 1 else None
    return 1 if node.rows == "drop" and before == 1 else None


def check_written(line: str, op: str, writes: Collection[str]) -> None:
    """Raises GraphError for columns that no op can write, or not without others."""
    for name in writes:
        if name in ROW_IDS:
            raise GraphError(
                f"{line}: {op} writes {name!r}, which the controller keeps for every row; call it otherwise"
            )
    if "response_ids" in writes and "response_mask" not in writes:
        raise GraphError(
            f"{line}: {op} writes response_ids, and the response_mask that is there is of other tokens; write both "
            "(1 where a token counts in losses)"
        )


def with_token_ids(reads: tuple[str, ...], writes: Collection[str], has: Collection[str]) -> tuple[str, ...]:
    """Columns read by an op of `reads`: one that writes some token ids is given the others, to count a row's tokens."""
    if not any(name in writes for name in SEQUENCE):
        return reads
    return (*reads, *(name for name in SEQUENCE if name not in reads and name not in writes and name in has))


def stale_columns(writes: Collection[str], has: Iterable[str]) -> frozenset[str]:
    """Columns of tokens that an op with new `response_ids` or `prompt_ids` replaces without writing them anew."""
    if "response_ids" in writes:
        per_token = (name for name in has if name in COLUMNS and COLUMNS[name].per_token)
        texts = (name for name in has if name in ("response", "raw_response"))
        return frozenset((*per_token, *texts)) - frozenset(writes)
    if "prompt_ids" in writes:  # what a model said about the response was said after another prompt
        said = ("rollout_log_probs", "old_log_probs", "ref_log_probs", "entropy", "values")
        return frozenset(name for name in has if name in said) - frozenset(writes)
    return frozenset()
