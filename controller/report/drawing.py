"""Where the nodes of a graph stand in its drawing: a row for each depth, nodes of one row beside each other.

The same edges as in the other drawings (`rlhf_dist/dataflow/draw.py`): pure ordering is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rlhf_dist.dataflow.draw import COLOURS, HOST_COLOUR

WIDTH, HEIGHT = 230, 96
"""Pixels from node to node."""
TITLE = 40
"""Pixels above a graph that has a title."""
DRAWN = ("data", "write-then-read")


def drawing(graph: Mapping[str, Any]) -> dict[str, Any]:
    """`nodes` with x, y, colour and what they read and write, `edges` with labels, and `parts`, a title and its y for
    each graph that held-out rows are evaluated with, which stand below the step's. graph: see `graph_file`."""
    evaluations = graph.get("evaluations", ())
    colours = _colours([node for one in (graph, *evaluations) for node in one["nodes"]])
    drawn = _part(graph, colours)
    parts: list[dict[str, Any]] = []
    for one in evaluations:
        part = _part(one, colours, f"{one['name']}/")
        parts.append({"title": f"{one['name']}, {one['when']}", "y": drawn["height"]})
        for node in part["nodes"]:
            node["y"] += drawn["height"] + TITLE
        drawn["nodes"] += part["nodes"]
        drawn["edges"] += part["edges"]
        drawn["width"] = max(drawn["width"], part["width"])
        drawn["height"] += TITLE + part["height"]
    return {**drawn, "parts": parts}


def _colours(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Role -> colour, of those that have one."""
    roles = list(dict.fromkeys(node["role"] for node in nodes if node["kind"] not in ("host", "state")))
    return {role: COLOURS[number % len(COLOURS)] for number, role in enumerate(roles)}


def _part(graph: Mapping[str, Any], colours: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    """One graph by itself; prefix: of its nodes' names, which are unique on the page with it."""
    nodes, edges = graph["nodes"], graph["edges"]
    rows = _rows(nodes, edges)
    widest = max((len(row) for row in rows), default=0)
    at = {
        name: ((column + (widest - len(row)) / 2) * WIDTH, depth * HEIGHT)
        for depth, row in enumerate(rows)
        for column, name in enumerate(row)
    }
    return {
        "width": widest * WIDTH,
        "height": len(rows) * HEIGHT,
        "nodes": [
            {
                **{key: node.get(key) for key in ("role", "op", "kind", "line", "every", "after")},
                "name": prefix + node["name"],
                "reads": [*node.get("reads", ()), *node.get("weights_read", ())],
                "writes": [*node.get("writes", ()), *node.get("weights_written", ())],
                "x": at[node["name"]][0],
                "y": at[node["name"]][1],
                "colour": colours.get(node["role"], HOST_COLOUR),
            }
            for node in nodes
        ],
        "edges": _joined(edges, prefix),
    }


def _rows(nodes: Sequence[Mapping[str, Any]], edges: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Names by depth. In a row nodes stand below the middle of what they come from, so that fewer edges cross."""
    before: dict[str, list[str]] = {}
    for edge in edges:
        if edge["distance"] == 0:
            before.setdefault(edge["target"], []).append(edge["source"])
    depth: dict[str, int] = {}
    for node in nodes:  # the recipe's order is topological
        depth[node["name"]] = 1 + max((depth.get(name, -1) for name in before.get(node["name"], ())), default=-1)
    rows: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for node in nodes:
        rows[depth[node["name"]]].append(node["name"])
    column: dict[str, float] = {}
    for row in rows:
        places = {name: fmean([column[b] for b in before.get(name, ()) if b in column] or [0.0]) for name in row}
        row.sort(key=places.__getitem__)
        column |= {name: number - (len(row) - 1) / 2 for number, name in enumerate(row)}
    return rows


def _joined(edges: Sequence[Mapping[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """Edges with the same ends as one."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for edge in edges:
        if edge["reason"] in DRAWN:
            key = (prefix + edge["source"], prefix + edge["target"], edge["distance"])
            one = found.setdefault(
                key, {"source": key[0], "target": key[1], "distance": key[2], "weights": False, "names": []}
            )
            one["names"].append(edge.get("column") or edge.get("weights"))
            one["weights"] |= "weights" in edge
    return list(found.values())
