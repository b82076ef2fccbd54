"""Drawing a dataflow: text for terminals, Mermaid for Markdown, DOT for Graphviz, JSON for programs.

JSON holds every edge. Drawings leave out pure ordering (read-then-write, write-then-write): it follows
from the weight edges that are shown and would hide the data. The graphs that held-out rows are evaluated with stand
apart from the step's, with when they are run.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_dist.dataflow.evaluation_graph import EvaluationGraph
from rlhf_dist.dataflow.graph import Dataflow, Edge, Node

COLOURS = ("#d7e8fa", "#fde5c8", "#dcefd5", "#f6d9de", "#e5dcf3", "#f7f1c4", "#d3eeee", "#ecdccb")
HOST_COLOUR = "#eeeeee"


def to_json(dataflow: Dataflow, evaluations: Sequence[EvaluationGraph] = ()) -> str:
    """Nodes and edges as a JSON object; an edge has either `column` or `weights`, and always `distance`. `evaluations`:
    the same of each graph that held-out rows are evaluated with, its cadence as `every` (0: before the first and after
    the last step only) and in words, and whether there are such rows."""
    found = [
        {"name": one.name, "every": one.every, "when": one.when, "rows": one.rows, **_plain(one.dataflow)}
        for one in evaluations
    ]
    return json.dumps({"name": dataflow.name, **_plain(dataflow), "evaluations": found}, indent=2)


def _plain(dataflow: Dataflow) -> dict[str, Any]:
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
    return {"nodes": nodes, "edges": [_edge_json(edge) for edge in dataflow.edges]}


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


def to_text(dataflow: Dataflow, evaluations: Sequence[EvaluationGraph] = ()) -> str:
    """A listing in the order of execution; a bracket joins nodes that may run at the same time. Below it, one of each
    graph that held-out rows are evaluated with."""
    lines = [f"{dataflow.name}: {len(dataflow.nodes)} nodes; roles {_roles(dataflow)}", "", *_listing(dataflow)]
    if any(len(set(levels(one).values())) < len(one.nodes) for one in (dataflow, *_graphs(evaluations))):
        lines += [
            "",
            "Nodes joined by a bracket do not wait for each other: in different pools they run at the same time.",
        ]
    carried = [edge for edge in _drawn(dataflow) if edge.distance]
    if carried:
        lines += ["", "From one step to a later one:"]
        lines += [f"    {edge.source} --{edge.weights}--> {edge.target}  ({_later(edge)})" for edge in carried]
    for one in evaluations:
        lines += ["", f"{_title(one)}: {len(one.dataflow.nodes)} nodes", "", *_listing(one.dataflow)]
    return "\n".join(lines)


def _listing(dataflow: Dataflow) -> list[str]:
    level, lines = levels(dataflow), list[str]()
    nodes = sorted(dataflow, key=lambda node: level[node.name])  # stable: the recipe's order within a level
    places = {node.name: node.line + _cadence(node) for node in nodes}
    width, place_width = max(map(len, places)), max(map(len, places.values()))
    for node in nodes:
        same = [other.name for other in nodes if level[other.name] == level[node.name]]
        first, last = node.name == same[0], node.name == same[-1]
        mark = " " if len(same) == 1 else "┌" if first else "└" if last else "│"
        head = f"{level[node.name] if first else '':>3} {mark} {node.name:<{width}}  {places[node.name]:<{place_width}}"
        below = f"    {' ' if last else '│'} {'':<{width}}  {'':<{place_width}}"
        for row, detail in enumerate(_details(node)):
            lines.append(f"{below if row else head}  {detail}".rstrip())
    return lines


def to_mermaid(dataflow: Dataflow, evaluations: Sequence[EvaluationGraph] = ()) -> str:
    """A Mermaid flowchart: solid arrows are columns, dotted ones weights; colours are roles. What is evaluated is a
    subgraph."""
    lines, members = ["flowchart TD"], dict[str, list[str]]()
    lines += _mermaid_nodes(dataflow, "n", members)
    for number, one in enumerate(evaluations):
        inside = _mermaid_nodes(one.dataflow, f"e{number}n", members)
        lines += [f'    subgraph e{number}["{_escape(_title(one))}"]', *(f"    {line}" for line in inside), "    end"]
    colours = _colours(dataflow, evaluations)
    for number, (role, names) in enumerate(members.items()):
        lines += [
            f"    classDef role{number} fill:{colours[role]},stroke:#555,color:#111",
            f"    class {','.join(names)} role{number}",
        ]
    return "\n".join(lines)


def _mermaid_nodes(dataflow: Dataflow, prefix: str, members: dict[str, list[str]]) -> list[str]:
    """Lines of nodes and arrows; adds to each role's `members` the ids of its nodes."""
    ids = {node.name: f"{prefix}{number}" for number, node in enumerate(dataflow)}
    lines = []
    for node in dataflow:
        members.setdefault(node.role, []).append(ids[node.name])
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
    return lines


def to_dot(dataflow: Dataflow, evaluations: Sequence[EvaluationGraph] = ()) -> str:
    """A Graphviz digraph: solid edges are columns, dashed ones weights; colours are roles. What is evaluated is a
    cluster."""
    colours = _colours(dataflow, evaluations)
    lines = [
        f"digraph {_quote(dataflow.name)} {{",
        '  node [shape=box, style="rounded,filled", fontname="sans-serif"];',
    ]
    lines.append('  edge [fontname="sans-serif", fontsize=10];')
    lines += _dot_nodes(dataflow, colours)
    for one in evaluations:
        inside = _dot_nodes(one.dataflow, colours, f"{one.name}/")
        label = f'    label={_quote(_title(one))}; fontname="sans-serif"; style=dashed;'
        lines += [f"  subgraph {_quote(f'cluster_{one.name}')} {{", label, *(f"  {line}" for line in inside), "  }"]
    return "\n".join([*lines, "}"])


def _dot_nodes(dataflow: Dataflow, colours: Mapping[str, str], prefix: str = "") -> list[str]:
    """Lines of nodes and edges; names are unique over all graphs with `prefix`."""
    label = {node.name: f"label={_quote(node.name)}, " if prefix else "" for node in dataflow}
    ids = {node.name: _quote(prefix + node.name) for node in dataflow}
    lines = [f"  {ids[node.name]} [{label[node.name]}fillcolor={_quote(colours[node.role])}];" for node in dataflow]
    for source, target, names in _grouped(dataflow):
        lines.append(f"  {ids[source]} -> {ids[target]} [label={_quote(', '.join(names))}];")
    for edge in _drawn(dataflow):
        if edge.weights:
            label_text = edge.weights + (f", {_later(edge)}" if edge.distance else "")
            loose = ", constraint=false" if edge.distance else ""
            lines.append(
                f"  {ids[edge.source]} -> {ids[edge.target]} [label={_quote(label_text)}, style=dashed{loose}];"
            )
    return lines


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


def _graphs(evaluations: Sequence[EvaluationGraph]) -> list[Dataflow]:
    return [one.dataflow for one in evaluations]


def _title(one: EvaluationGraph) -> str:
    return f"{one.name}, {one.when}"


def _colours(dataflow: Dataflow, evaluations: Sequence[EvaluationGraph]) -> dict[str, str]:
    """Role -> colour; host ops and the controller's own nodes are grey."""
    roles = list(dict.fromkeys(node.role for one in (dataflow, *_graphs(evaluations)) for node in one))
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
