"""Which calls of a run are kept or profiled, for people who look inside later; the processes write the files.

output.inputs_every, .inputs_nodes    due steps: inputs and outputs of every call
always, unless output.keep_inputs=0   inputs of a call that fails
profile.steps                         a trace of every op on every rank
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_dist.dataflow.graph import Node
from rlhf_dist.saved_calls import prune, step_folder
from rlhf_dist.wire import Look

PROFILES = "profile"
"""Folder of a run."""
TRACE = ".json.gz"
"""End of a trace's name, behind its node's."""
WITHOUT_ROWS = ("reshard", "weights")
"""Kinds of nodes that are given weights only, which checkpoints have."""


@dataclass(frozen=True, kw_only=True)
class Looking:
    """What is kept of the calls of a run."""

    folder: Path
    """Of the run."""
    every: int = 0
    keep: int = 2
    nodes: Collection[str] = ()
    profiled: Collection[int] = ()

    def of(
        self,
        node: Node,
        step: int,
        *,
        part: int,
        of_rows: int | None = None,
        answers: bool = True,
        streamed: bool = False,
        numbers: Mapping[str, Mapping[str, Any]],
        given: Mapping[str, Any],
    ) -> Look | None:
        """What a process is to keep of its call; None: nothing, whatever happens. of_rows: see `SavedCall`. answers:
        it is the one of several ranks with the same rows that writes them."""
        rows = bool(self.keep) and node.kind not in WITHOUT_ROWS and node.op != "dump"
        profile = str(self._root / self.profile_of(step).relative_to(self.folder)) if step in self.profiled else ""
        if not rows and not profile:
            return None
        due = self.due(step) and answers and (not self.nodes or node.name in self.nodes)
        inputs = str(step_folder(self._root, step)) if rows else ""
        return Look(
            inputs=inputs, due=due, part=part, of_rows=of_rows, streamed=streamed, numbers=numbers, given=given,
            profile=profile,
        )  # fmt: skip

    @cached_property
    def _root(self) -> Path:
        """The folder as other processes know it; asked of the disk once, not for every call."""
        return self.folder.resolve()

    def due(self, step: int) -> bool:
        """Whether the inputs of this step are kept in any case."""
        return bool(self.every and self.keep) and step % self.every == 0

    def profile_of(self, step: int) -> Path:
        """The folder with the traces of a step."""
        return self.folder / PROFILES / f"step_{step:06d}"

    def after(self, step: int) -> list[str]:
        """A step has ended: older inputs go. What to tell people."""
        if self.due(step):
            self.bound()
        if step not in self.profiled:
            return []
        folder = self.profile_of(step)
        traces = sorted(folder.glob(f"*/[!.]*{TRACE}"))
        if not traces:
            return [f"step {step} was to be profiled, and no process has written a trace to {folder}"]
        ranks = len({trace.parent for trace in traces})
        return [f"profiled step {step}: {len(traces)} traces of {ranks} processes in {folder}"]

    def bound(self) -> None:
        """Only the newest steps' inputs stay."""
        if self.keep:
            prune(self.folder, self.keep)

    def kept(self, node: str, step: int) -> Path | None:
        """Where the calls of a node are; None where there are none."""
        folder = step_folder(self.folder, step) / node
        return folder if any(folder.glob("part_*/call.json")) else None
