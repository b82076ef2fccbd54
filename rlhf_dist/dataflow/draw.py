"""Drawing a dataflow: text for terminals, Mermaid for Markdown, DOT for Graphviz, JSON for programs.

JSON holds every edge. Drawings leave out pure ordering (read-then-write, write-then-write): it follows
from the weight edges that are shown and would hide the data.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from typing import Any

from rlhf_dist.dataflow.graph import Dataflow, Edge, Node

COLOURS = ("#d7e8fa", "#fde5c8", "#dcefd5", "#f6d9de", "#e5dcf3", "#f7f1c4", "#d3eeee", "#ecdccb")
HOST_COLOUR = "#eeeeee"


def to_json(dataflow: Dataflow) -> str:
    """Nodes and edges as a JSON object; an edge has either `column` or `weights`, and always `distance`."""
    nodes = [
        {
            "name": node.name,
            "role": node.role,
            "op": node.op,
            "kind": node.kind,
            "reads": list(node.reads),
            "writes": list(node.writes),
            "weights_read": list(node.weights_read),
            "weights_written": list(node.weights_written),
            "rows": node.rows,
            "every": node.every,
            "after": node.after,
            "line": node.line,
        }
        for node in dataflow
    ]
    edges = [_edge_json(edge) for edge in dataflow.edges]
    return json.dumps({"name": dataflow.name, "nodes": nodes, "edges": edges}, indent=2)


def levels(dataflow: Dataflow) -> dict[str, int]:
    """Node -> its depth in one step; nodes of one depth do not wait for each other."""
    level: dict[str, int] = {}
    before: dict[str, list[str]] = {}
    for source, target, distance in dataflow.waits:
        if distance == 0:
            before.setdefault(target, []).append(source)
    for node in dataflow:  # the recipe's order is topological
        level[node.name] = 1 + max((level[name] for name in before.get(node.name, ())), default=-1)
    return level


def to_text(dataflow: Dataflow) -> str:
    """A listing in the order of execution; a bracket joins nodes that may run at the same time."""
    level = levels(dataflow)
    nodes = sorted(dataflow, key=lambda node: level[node.name])  # stable: the recipe's order within a level
    places = {node.name: node.line + _cadence(node) for node in nodes}
    width, place_width = max(map(len, places)), max(map(len, places.values()))
    lines = [f"{dataflow.name}: {len(nodes)} nodes; roles {_roles(dataflow)}", ""]
    for node in nodes:
        same = [other.name for other in nodes if level[other.name] == level[node.name]]
        first, last = node.name == same[0], node.name == same[-1]
        mark = " " if len(same) == 1 else "┌" if first else "└" if last else "│"
        head = f"{level[node.name] if first else '':>3} {mark} {node.name:<{width}}  {places[node.name]:<{place_width}}"
        below = f"    {' ' if last else '│'} {'':<{width}}  {'':<{place_width}}"
        for row, detail in enumerate(_details(node)):
            lines.append(f"{below if row else head}  {detail}".rstrip())
    if len(set(level.values())) < len(nodes):
        lines += [
            "",
            "Nodes joined by a bracket do not wait for each other: in different pools they run at the same time.",
        ]
    carried = [edge for edge in _drawn(dataflow) if edge.distance]
    if carried:
        lines += ["", "From one step to a later one:"]
        lines += [f"    {edge.source} --{edge.weights}--> {edge.target}  ({_later(edge)})" for edge in carried]
    return "\n".join(lines)


def to_mermaid(dataflow: Dataflow) -> str:
    """A Mermaid flowchart: solid arrows are columns, dotted ones weights; colours are roles."""
    ids = {node.name: f"n{number}" for number, node in enumerate(dataflow)}
    lines = ["flowchart TD"]
    for node in dataflow:
        opening, closing = {
            "source": ("([", "])"),
            "reshard": ("{{", "}}"),
            "weights": ("{{", "}}"),
            "state": ("[(", ")]"),
        }.get(node.kind, ("[", "]"))
        lines.append(f'    {ids[node.name]}{opening}"{_escape(node.name)}"{closing}')
    for source, target, names in _grouped(dataflow):
        lines.append(f'    {ids[source]} -->|"{_escape(", ".join(names))}"| {ids[target]}')
    for edge in _drawn(dataflow):
        if edge.weights:
            label = edge.weights + (f", {_later(edge)}" if edge.distance else "")
            lines.append(f'    {ids[edge.source]} -.->|"{_escape(label)}"| {ids[edge.target]}')
    for number, (role, colour) in enumerate(_colours(dataflow).items()):
        members = ",".join(ids[node.name] for node in dataflow if node.role == role)
        lines += [
            f"    classDef role{number} fill:{colour},stroke:#555,color:#111",
            f"    class {members} role{number}",
        ]
    return "\n".join(lines)


def to_dot(dataflow: Dataflow) -> str:
    """A Graphviz digraph: solid edges are columns, dashed ones weights; colours are roles."""
    colours = _colours(dataflow)
    lines = [
        f"digraph {_quote(dataflow.name)} {{",
        '  node [shape=box, style="rounded,filled", fontname="sans-serif"];',
    ]
    lines.append('  edge [fontname="sans-serif", fontsize=10];')
    lines += [f"  {_quote(node.name)} [fillcolor={_quote(colours[node.role])}];" for node in dataflow]
    for source, target, names in _grouped(dataflow):
        lines.append(f"  {_quote(source)} -> {_quote(target)} [label={_quote(', '.join(names))}];")
    for edge in _drawn(dataflow):
        if edge.weights:
            label = edge.weights + (f", {_later(edge)}" if edge.distance else "")
            loose = ", constraint=false" if edge.distance else ""
            lines.append(
                f"  {_quote(edge.source)} -> {_quote(edge.target)} [label={_quote(label)}, style=dashed{loose}];"
            )
    return "\n".join([*lines, "}"])


FORMATS = {"text": to_text, "mermaid": to_mermaid, "dot": to_dot, "json": to_json}


def _edge_json(edge: Edge) -> dict[str, Any]:
    what: dict[str, Any] = {"weights": edge.weights} if edge.column is None else {"column": edge.column}
    return {"source": edge.source, "target": edge.target, **what, "distance": edge.distance, "reason": edge.reason}


def _drawn(dataflow: Dataflow) -> list[Edge]:
    return [edge for edge in dataflow.edges if edge.reason in ("data", "write-then-read")]


def _grouped(dataflow: Dataflow) -> Iterable[tuple[str, str, list[str]]]:
    """Column edges with the same ends as one: (source, target, columns)."""
    found: dict[tuple[str, str], list[str]] = {}
    for edge in _drawn(dataflow):
        if edge.column is not None:
            found.setdefault((edge.source, edge.target), []).append(edge.column)
    return [(source, target, names) for (source, target), names in found.items()]


def _details(node: Node, width: int = 72) -> list[str]:
    """What a node reads and writes, columns first, then weight states, in lines of about `width`."""
    lines: list[str] = []
    reads, writes = (*node.reads, *node.weights_read), (*node.writes, *node.weights_written)
    for what, names in (("reads ", reads), ("writes", writes)):
        if names:
            wrapped = textwrap.wrap(", ".join(names), width, break_long_words=False, break_on_hyphens=False)
            lines += [f"{what if not row else '      '} {line}" for row, line in enumerate(wrapped)]
    return lines or [""]


def _cadence(node: Node) -> str:
    return (f" every {node.every}" if node.every > 1 else "") + (f" from step {node.after}" if node.after else "")


def _roles(dataflow: Dataflow) -> str:
    return ", ".join(f"{role} ({kind})" for role, kind in dataflow.roles.items())


def _later(edge: Edge) -> str:
    return "next step" if edge.distance == 1 else f"{edge.distance} steps later"


def _colours(dataflow: Dataflow) -> dict[str, str]:
    """Role -> colour; host ops and the controller's own nodes are grey."""
    roles = list(dict.fromkeys(node.role for node in dataflow))
    named = [role for role in roles if role in dataflow.roles]
    return {
        role: COLOURS[named.index(role) % len(COLOURS)] if role in dataflow.roles else HOST_COLOUR for role in roles
    }


def _escape(text: str) -> str:
    """Mermaid reads `#` and quotes in a label as entities."""
    return text.replace("#", "#35;").replace('"', "#quot;")


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
