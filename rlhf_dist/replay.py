"""Rows of earlier steps, as a state: added at one place of a recipe, drawn at another.

    def recipe(prompts: Prompts, actor: Actor, buffer: Replay, ...):
        old = buffer.sample(rows=64)                 before the first `add`: none
        ...
        buffer.add(batch)

The rows lie in the object store with the behaviour policy's log-probs and versions, and go into checkpoints; the
controller has a reference. An `add` copies what is kept: bytes of the buffer a step, on one CPU process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import HostResult
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import State, state_op
from rlhf_dist.schema import COLUMNS, TRAINABLE

REPLAYED = (*TRAINABLE, "rollout_log_probs", "policy_version", "rewards")
"""What is kept of a row unless it is said."""


def _columns(settings: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(settings["columns"])


class Replay(State):
    """The newest rows of earlier steps, whole groups. A class of its own sets another `capacity`."""

    capacity: ClassVar[int] = 4096
    """Rows."""

    def initial(self, cfg: Any) -> dict[str, Any]:
        """No rows."""
        return {"size": 0.0}

    @state_op(reads=_columns, missing=True)
    def add(
        self, values: dict[str, Any], batch: Batch, *, columns: tuple[str, ...] = REPLAYED
    ) -> tuple[dict[str, Any], Mapping[str, Mean]]:
        """Keep these rows, and let the oldest groups go that are more than `capacity` rows."""
        new = batch.select(*columns)
        rows = Batch.concat([values["rows"], new]) if "rows" in values else new
        if rows.num_rows > self.capacity:
            oldest = rows["group_id"].values[: rows.num_rows - self.capacity]
            rows = rows.take(np.flatnonzero(~np.isin(rows["group_id"].values, oldest)))
        return {"rows": rows, "size": float(rows.num_rows)}, {"size": Mean(float(rows.num_rows), 0)}

    @state_op(writes=_columns, rows="new")
    def sample(
        self, values: dict[str, Any], *, rows: int, columns: tuple[str, ...] = REPLAYED, rng: np.random.Generator
    ) -> tuple[dict[str, Any], HostResult]:
        """`rows` rows, drawn evenly without replacement; all there are where they are fewer."""
        held: Batch = values.get("rows", _no_rows(columns))
        drawn = np.sort(rng.permutation(held.num_rows)[:rows])
        return values, HostResult(
            columns=held.select(*columns).take(drawn), metrics={"sampled": Mean(float(len(drawn)), 0)}
        )


def _no_rows(columns: tuple[str, ...]) -> Batch:
    """Columns of a kind that what is put together with them has; a user's own are numbers of a row."""
    empty: dict[str, Column] = {}
    for name in columns:
        spec = COLUMNS.get(name)
        if spec is not None and spec.dtype == "text":
            empty[name] = Column.strings([])
        elif spec is not None and spec.shape != "[B]":
            empty[name] = Column.ragged([], dtype=spec.dtype)
        else:
            empty[name] = Column(np.empty(0, spec.dtype if spec is not None else np.float32))
    return Batch(empty, 0)
