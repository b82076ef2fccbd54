"""What a check says: a state, what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from controller.doctor.node_facts import NodeFacts
    from controller.doctor.subject import Subject

State = Literal["skipped", "ok", "warning", "failed"]
_BY_WEIGHT: tuple[State, ...] = ("skipped", "ok", "warning", "failed")
_MOST_NODES = 3
"""Nodes that a line names."""


@dataclass(frozen=True)
class Finding:
    """The answer of one check. Texts are one line."""

    state: State
    found: str
    advice: str = ""
    """What to do; empty where there is nothing to."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of the catalogue."""

    name: str
    run: Callable[[Subject], Finding]
    limit_s: float = 10.0
    """Longest it may take; a check that takes longer has failed."""
    advice: str = "this should not happen, whatever the cluster is like: report it with this line"
    """What to do where it raises or hangs."""


def ok(found: str) -> Finding:
    """As it should be."""
    return Finding("ok", found)


def skipped(found: str, advice: str = "") -> Finding:
    """Not looked at; `found` says why."""
    return Finding("skipped", found, advice)


def warning(found: str, advice: str) -> Finding:
    """A run starts, and may be slow or end later."""
    return Finding("warning", found, advice)


def failed(found: str, advice: str) -> Finding:
    """A run does not work like that."""
    return Finding("failed", found, advice)


def of_nodes(nodes: Sequence[NodeFacts], judge: Callable[[NodeFacts], Finding]) -> Finding:
    """One finding for all nodes: the worst of them, and on which nodes it is."""
    findings = {node.name: judge(node) for node in nodes}
    worst = max(findings.values(), key=lambda finding: _BY_WEIGHT.index(finding.state))
    if len(set(findings.values())) == 1:
        return worst
    alike = {address: finding for address, finding in findings.items() if finding.state == worst.state}
    named = [f"{address}: {finding.found}" for address, finding in list(alike.items())[:_MOST_NODES]]
    more = [f"and {len(alike) - _MOST_NODES} more nodes"] if len(alike) > _MOST_NODES else []
    return Finding(worst.state, "; ".join([*named, *more]), worst.advice)


def nbytes(count: float) -> str:
    """`3.2 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def counted(count: int, what: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")
