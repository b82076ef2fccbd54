"""What a process keeps of the calls of a step, in files that hold no code: Arrow, and JSON for the rest.

    runs/NAME/inputs/step_000003/actor.update_actor/part_0/
        call.json       step, node, line, rank, settings that come from states, why it failed
        batch_0.arrow   rows as the op was given them, with `.row_index` and, for updates, `.mini_batch`
        outputs.arrow   what it wrote, with `.parent` where it made or dropped rows; not there where it failed
        state/          values of a State before the call (`workers/states.py`)

A part is the share of the rows that one rank answers for, or one shard of a host op. Written beside and renamed: a part
is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_dist.batch import Batch, Column, IntArray

INPUTS = "inputs"
"""Folder of a run."""
STATE = "state"
ROW_INDEX, MINI_BATCH, PARENT = ".row_index", ".mini_batch", ".parent"
"""Columns beside the op's own, whose names have no dot in front."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedRows:
    """The rows of one batch that a call was given."""

    columns: Batch
    row_index: IntArray
    """[B] see `wire.Given`."""
    mini_batch: IntArray | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedCall:
    """One call, or several that were put together."""

    step: int
    node: str
    line: str = ""
    part: int = 0
    rank: int = 0
    of_rows: int | None = None
    """Rows of the node's first batch, of which these are one part; None: not known yet, or it has none."""
    streamed: bool = False
    """Its rows came as they were made: their positions in the whole batch were not known."""
    numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of the states that its settings use."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Of a source: how many rows, from where."""
    weights_step: int | None = None
    """Steps done that the weights were of which it generated with; None where it did not."""
    failure: str = ""
    batches: tuple[SavedRows, ...] = ()
    outputs: Batch | None = None
    """None where it failed."""
    parent: IntArray | None = None
    """[B'] see `wire.OpResult`."""
    folder: Path | None = None
    """Where it was read from."""


PLAIN = ("step", "node", "line", "part", "rank", "of_rows", "streamed", "numbers", "given", "weights_step", "failure")
"""Fields in call.json."""


def step_folder(run: Path, step: int) -> Path:
    """Of the calls of a step."""
    return run / INPUTS / f"step_{step:06d}"


def write_call(step: Path, call: SavedCall, write_state: Any = None) -> Path:
    """Write one part below the folder of its step; its folder. write_state: called with a folder, for a State's."""
    target = step / call.node / f"part_{call.part}"
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for k, rows in enumerate(call.batches):
        extra = {ROW_INDEX: Column(rows.row_index)}
        if rows.mini_batch is not None:
            extra[MINI_BATCH] = Column(rows.mini_batch)
        _write_arrow(partial / f"batch_{k}.arrow", rows.columns.with_columns(extra))
    if call.outputs is not None:
        parent = {} if call.parent is None else {PARENT: Column(call.parent)}
        _write_arrow(partial / "outputs.arrow", call.outputs.with_columns(parent))
    if write_state is not None:
        write_state(partial / STATE)
    (partial / "call.json").write_text(json.dumps({name: getattr(call, name) for name in PLAIN}), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target


def read_calls(step: Path, node: str) -> list[SavedCall]:
    """The parts of a node, in order. Raises ValueError for files that are not what was written."""
    with _as_written(step / node) as folders:
        return [_read(folder) for folder in folders]


def failure_of(step: Path, node: str) -> str:
    """Why a node failed; empty where it did not. Reads none of its rows. Raises ValueError like `read_calls`."""
    with _as_written(step / node) as folders:
        return next((said for folder in folders if (said := str(_plain(folder)["failure"]))), "")


def saved_steps(run: Path) -> dict[int, list[str]]:
    """Step -> the nodes of which there are calls."""
    found: dict[int, list[str]] = {}
    for folder in sorted((run / INPUTS).glob("step_*")):
        if re.fullmatch(r"step_\d+", folder.name):
            nodes = sorted(one.name for one in folder.iterdir() if any(one.glob("part_*/call.json")))
            found |= {int(folder.name[5:]): nodes} if nodes else {}
    return found


def prune(run: Path, keep: int) -> None:
    """Remove the calls of all but the newest `keep` steps."""
    steps = sorted(folder for folder in (run / INPUTS).glob("step_*") if re.fullmatch(r"step_\d+", folder.name))
    for old in steps[: max(0, len(steps) - keep)]:
        shutil.rmtree(old, ignore_errors=True)


def together(calls: Sequence[SavedCall]) -> SavedCall:
    """The parts of a node's rows as one call, rows in the order of the whole batch; a single part as it is."""
    if len(calls) == 1:
        return calls[0]
    first = calls[0]
    batches = tuple(_joined([call.batches[k] for call in calls]) for k in range(len(first.batches)))
    outputs = parent = None
    if all(call.outputs is not None for call in calls) and batches:
        inputs = [call.batches[0].row_index for call in calls]
        origins = [
            index if call.parent is None else index[call.parent] for index, call in zip(inputs, calls, strict=True)
        ]
        origin = np.concatenate(origins)
        order = np.argsort(origin, kind="stable")
        written = [call.outputs for call in calls if call.outputs is not None]
        if all(one.num_rows == len(rows) for one, rows in zip(written, origins, strict=True)):
            outputs = Batch.concat(written).take(order) if written[0].keys() else Batch({}, len(order))
            whole = np.sort(np.concatenate(inputs))
            parent = None if first.parent is None else np.searchsorted(whole, origin[order])
    return SavedCall(
        **{name: getattr(first, name) for name in PLAIN if name not in ("part", "failure")},
        failure="; ".join(dict.fromkeys(call.failure for call in calls if call.failure)),
        batches=batches,
        outputs=outputs,
        parent=parent,
        folder=first.folder,
    )


def _joined(parts: Sequence[SavedRows]) -> SavedRows:
    row_index = np.concatenate([part.row_index for part in parts])
    order = np.argsort(row_index, kind="stable")
    columns = Batch.concat([part.columns for part in parts]) if parts[0].columns.keys() else Batch({}, len(order))
    mini_batches = [part.mini_batch for part in parts if part.mini_batch is not None]
    return SavedRows(
        columns=columns.take(order),
        row_index=row_index[order],
        mini_batch=np.concatenate(mini_batches)[order] if mini_batches else None,
    )


@contextmanager
def _as_written(node: Path) -> Iterator[list[Path]]:
    """The folders of its parts, in order; what is wrong with their files is said of them."""
    try:
        folders = [folder for folder in node.glob("part_*") if (folder / "call.json").is_file()]
        yield sorted(folders, key=lambda folder: int(folder.name.removeprefix("part_")))
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{node} is not what a run wrote ({error}); save the step again") from error


def _plain(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "call.json").read_text(encoding="utf-8"))
    return found


def _read(folder: Path) -> SavedCall:
    plain = _plain(folder)
    files = sorted(folder.glob("batch_*.arrow"), key=lambda file: int(file.stem.split("_")[1]))
    outputs = _read_arrow(folder / "outputs.arrow") if (folder / "outputs.arrow").is_file() else None
    parent = _values(outputs, PARENT) if outputs is not None else None
    return SavedCall(
        **{name: plain[name] for name in PLAIN},
        batches=tuple(_rows(_read_arrow(file)) for file in files),
        outputs=None if outputs is None else _own(outputs),
        parent=parent,
        folder=folder,
    )


def _rows(batch: Batch) -> SavedRows:
    return SavedRows(columns=_own(batch), row_index=batch[ROW_INDEX].values, mini_batch=_values(batch, MINI_BATCH))


def _own(batch: Batch) -> Batch:
    return batch.select(*(name for name in batch if not name.startswith(".")))


def _values(batch: Batch, name: str) -> npt.NDArray[Any] | None:
    return batch[name].values if name in batch else None


def _write_arrow(file: Path, batch: Batch) -> None:
    """A batch without columns is a file with the number of its rows alone."""
    import pyarrow as pa

    if not batch.keys():
        batch = Batch({".rows": Column(np.zeros(batch.num_rows, np.int8))}, batch.num_rows)
    table = batch.to_arrow()
    with pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)


def _read_arrow(file: Path) -> Batch:
    import pyarrow as pa

    with pa.OSFile(str(file)) as stream:
        return Batch.from_arrow(pa.ipc.open_file(stream).read_all())
