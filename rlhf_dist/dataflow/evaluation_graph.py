"""A graph that is run on held-out rows, between steps or beside them: drawn by itself."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_dist.dataflow.graph import Dataflow


@dataclass(frozen=True, kw_only=True)
class EvaluationGraph:
    """What is asked about held-out rows, and when."""

    name: str
    """What its metrics begin with: `heldout`, or `heldout/ROLE` where several roles are evaluated."""
    dataflow: Dataflow
    every: int
    """Steps between two evaluations; 0: before the first and after the last step only."""
    rows: bool = True
    """There are held-out rows (`data.heldout`); without them it never runs."""
    beside: bool = False
    """It runs beside steps (`output.evaluate_beside`), and between them only before the first and after the last."""

    @property
    def source(self) -> str:
        """Its one source parameter, which held-out rows come to."""
        return next(node.role for node in self.dataflow if node.kind == "source")

    @property
    def when(self) -> str:
        """Its cadence in words."""
        if not self.rows:
            return "never, since data.heldout is not set"
        if self.beside:
            each = "every step" if self.every == 1 else f"one step in {self.every}, from step 0 on"
            return f"beside {each}, and after the last"
        between = {0: "", 1: ", after every step"}.get(self.every, f", after every {self.every} steps")
        return f"before the first step{between}{' and after the last' if self.every != 1 else ''}"
