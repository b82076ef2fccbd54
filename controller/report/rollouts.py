"""Rollouts of a run as blocks: one Parquet file, one block of compressed columns.

The browser unpacks a block when it is looked at, so that 100 MB of rollouts do not make a page slow. Where the texts
come to more than a budget, each file gives its first rows, as many as a fair share allows; `shown` and `rows` say so.

    block   {"columns": {"response": [...], "rewards": [...], "policy_version": [[[12, 40], [13, 2]], ...]}}
            numbers a row, texts a row, or runs of equal numbers [value, how often] of each row's tokens
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from controller.report.curves import short
from rlhf_dist.batch import Column

BUDGET_BYTES = 256 << 20
"""Most bytes of rollouts in a page, before they are compressed; a browser holds a few blocks of them at a time."""
TEXT_CHARACTERS = 20_000
"""Longest text of one cell; what is cut off is said."""
RUNS = 2_000
"""Most runs of equal numbers of one row."""
FILE = re.compile(r"step_(\d+)\.parquet")


@dataclass(frozen=True, kw_only=True)
class RolloutFile:
    """One file of rollouts. part: empty for those of training, `heldout` or `heldout/ROLE`."""

    path: Path
    part: str
    step: int
    rows: int
    nbytes: int


def list_rollouts(folder: Path) -> tuple[list[RolloutFile], list[str]]:
    """Rollout files of a run by part and step, and the names of those that cannot be read."""
    import pyarrow.parquet as pq

    found, unreadable = [], []
    for path in sorted((folder / "rollouts").rglob("step_*.parquet")):
        matched = FILE.fullmatch(path.name)
        if matched is None:
            continue
        part = path.parent.relative_to(folder / "rollouts").as_posix()
        try:
            about = pq.read_metadata(path)
        except (OSError, ValueError):  # pyarrow's ArrowInvalid is a ValueError
            unreadable.append(path.relative_to(folder).as_posix())
            continue
        size = sum(about.row_group(k).total_byte_size for k in range(about.num_row_groups))
        found.append(
            RolloutFile(
                path=path, part="" if part == "." else part, step=int(matched[1]), rows=about.num_rows, nbytes=size
            )
        )
    return sorted(found, key=lambda one: (one.part, one.step)), unreadable


def fair_share(sizes: Sequence[int], budget: int) -> int:
    """The most that each may have so that all together keep to the budget: small ones whole, large ones alike."""
    left, share = budget, budget
    for number, size in enumerate(sorted(sizes)):
        share = left // (len(sizes) - number)
        if size > share:
            return share
        left -= size
    return max(share, max(sizes, default=0))


@dataclass(frozen=True, kw_only=True)
class Block:
    """What a page has of one file: its entry in the list, and the columns."""

    entry: dict[str, Any]
    columns: dict[str, Any]


def blocks(files: Sequence[RolloutFile], budget: int = BUDGET_BYTES) -> Iterator[Block]:
    """A block of each file, in order."""
    share = fair_share([one.nbytes for one in files], budget)
    for one in files:
        yield read_block(one, share)


def read_block(file: RolloutFile, share: int = BUDGET_BYTES) -> Block:
    """The first rows of a file, of about `share` bytes, at least one."""
    import pyarrow.parquet as pq

    table = pq.read_table(file.path)
    # Metadata counts a text that repeats once; the table counts it as often as a page holds it.
    if table.nbytes > share:
        table = table.slice(0, max(1, int(table.num_rows * share / table.nbytes)))
    found = {name: _column(name, table.column(name)) for name in table.column_names}
    prompts = found.get("prompt", [])
    # A prompt is found again in other files by its number, without unpacking them.
    found["prompt_key"] = [zlib.crc32(text.encode("utf-8", "surrogatepass")) for text in prompts]
    entry = {
        "part": file.part,
        "step": file.step,
        "rows": file.rows,
        "shown": table.num_rows,
        "prompts": sorted(set(found["prompt_key"])),
        "repeated": _repeated(prompts, found.get("response", [])),
    }
    return Block(entry=entry, columns=found)


def _column(name: str, column: Any) -> list[Any]:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [_bounded(text) for text in column.to_pylist()]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _runs(Column.from_arrow(column))
    if pa.types.is_floating(kind):
        return [_number(value) for value in column.to_pylist()]
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return list(column.to_pylist())
    return [_bounded(json.dumps(value, default=str)) for value in column.to_pylist()]


def _bounded(text: str | None) -> str:
    text = text or ""
    cut = len(text) - TEXT_CHARACTERS
    return text if cut <= 0 else f"{text[:TEXT_CHARACTERS]} [{cut} more characters]"


def _runs(column: Column) -> list[list[list[Any]]]:
    """[B] runs of equal numbers of each row, as [value, how often]; of tokens with several numbers, of the first."""
    if column.offsets is None:
        values, offsets = column.values.reshape(-1), np.arange(len(column) + 1) * (column.values[:1].size or 1)
    else:
        values, offsets = column.values if column.values.ndim == 1 else column.values[:, 0], column.offsets
    begins = np.zeros(len(values) + 1, dtype=bool)
    begins[offsets], begins[-1] = True, True
    begins[1:-1] |= values[1:] != values[:-1]
    at = np.flatnonzero(begins)
    of_row = np.searchsorted(at, offsets)
    said = [_number(value) for value in values[at[:-1]].tolist()]
    lengths = np.diff(at).tolist()
    return [
        [[said[k], lengths[k]] for k in range(first, min(end, first + RUNS))]
        for first, end in zip(of_row[:-1].tolist(), of_row[1:].tolist(), strict=True)
    ]


def _number(value: Any) -> Any:
    """As JSON has it: no NaN, and no more digits than a screen shows."""
    return value if not isinstance(value, float) else short(value) if math.isfinite(value) else None


def _repeated(prompts: Sequence[str], responses: Sequence[str]) -> float | None:
    """Share of rows with the most frequent response, of rows to different prompts; None for fewer than 8 prompts.

    A policy that has found one text which the reward likes says it to everything.
    """
    if len(set(prompts)) < 8 or not responses:
        return None
    said: dict[str, set[str]] = {}
    for prompt, response in zip(prompts, responses, strict=True):
        said.setdefault(response.strip(), set()).add(prompt)
    return short(max(len(to) for to in said.values()) / len(set(prompts)))
