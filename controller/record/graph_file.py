"""`graph.json` in a run's folder: the graph that is driven, and which node each metric came from.

What `rlhf-dist graph --format json` prints, with `metrics` beside it. Whoever reads a run needs neither the recipe's
file nor to run it: a folder that somebody shares is data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from controller.execution.executor import Finished
from rlhf_dist.dataflow.draw import to_json
from rlhf_dist.dataflow.evaluation_graph import EvaluationGraph
from rlhf_dist.dataflow.graph import Dataflow

NAME = "graph.json"


class GraphFile:
    """Written at the start, and again when a node tells a metric for the first time."""

    def __init__(self, folder: Path, dataflow: Dataflow, evaluations: Sequence[EvaluationGraph] = ()) -> None:
        self._path = folder / NAME
        self._graph = json.loads(to_json(dataflow, evaluations))
        self._node_of: dict[str, str] = {}
        self._write()

    def saw(self, finished: Iterable[Finished]) -> None:
        """Nodes of a step that is done."""
        told = {name: one.node for one in finished for name in one.metrics}
        if told.keys() - self._node_of.keys():
            self._node_of |= told
            self._write()

    def _write(self) -> None:
        partial = self._path.with_name(f".{NAME}.partial")
        partial.write_text(json.dumps({**self._graph, "metrics": self._node_of}, indent=1), encoding="utf-8")
        partial.replace(self._path)
