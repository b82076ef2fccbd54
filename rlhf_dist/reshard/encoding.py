"""Layouts as JSON, for ranks that share no more than a connection: nothing that arrives there is unpickled.

Parameters cut alike are written once:

    world       4
    cuts        [{"rank": [...], "start": [[...]], "stop": [[...]]}, ...]
    parameters  {name: [shape, dtype, index of its cut]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_dist.reshard.layout import Layout, ParameterLayout


def layout_to_json(layout: Layout) -> dict[str, Any]:
    """Numbers, texts, lists and dicts."""
    cuts: list[dict[str, Any]] = []
    index: dict[tuple[bytes, bytes, bytes], int] = {}
    parameters: dict[str, Any] = {}
    for name, p in layout.parameters.items():
        key = (p.rank.tobytes(), p.start.tobytes(), p.stop.tobytes())
        if key not in index:
            index[key] = len(cuts)
            cuts.append({"rank": p.rank.tolist(), "start": p.start.tolist(), "stop": p.stop.tolist()})
        parameters[name] = [list(p.shape), p.dtype, index[key]]
    return {"world": layout.world, "cuts": cuts, "parameters": parameters}


def layout_from_json(told: Mapping[str, Any]) -> Layout:
    """The reverse; its digest is that of the layout it was made of."""
    parameters = {}
    for name, (shape, dtype, cut) in told["parameters"].items():
        boxes = told["cuts"][cut]
        rank = np.array(boxes["rank"], np.int64)
        start, stop = (np.array(boxes[k], np.int64).reshape(len(rank), len(shape)) for k in ("start", "stop"))
        parameters[name] = ParameterLayout(tuple(shape), dtype, rank, start, stop)
    return Layout(told["world"], parameters)
