"""A reward function in the process of the person who debugs it: no limits, and `breakpoint()` stops in it."""

from __future__ import annotations

import math
import pickle

from rlhf_dist.rewards.calls import NOT_CALLED, Calls, Outcome, Rows
from rlhf_dist.rewards.load import LoadedReward


class ScoringHere:
    """What `ScoringProcess` does, without the process."""

    def __init__(self, function: LoadedReward) -> None:
        self._signature = function.signature
        loaded = pickle.loads(function.payload)  # made in this process a moment ago, never read from a file
        self._calls = Calls(loaded, function.signature, timeout_s=math.inf, concurrency=1, alone=False)

    def score(self, rows: Rows, num_rows: int, *, stop: bool = True) -> list[Outcome]:
        """See `ScoringProcess.score`."""
        outcomes: list[Outcome] = []
        for finished in self._calls.run(rows, num_rows, [0.0] * num_rows) if num_rows else ():
            outcomes += finished.outcomes
            if stop and any(isinstance(outcome, str) for outcome in finished.outcomes):
                break
        return [*outcomes, *[NOT_CALLED] * (num_rows - len(outcomes))]

    def close(self) -> None:
        """There is nothing to end."""
