"""Raw rows of a source, one dict each: from Parquet, JSONL, a reasoning-gym data set or a user's function."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_dist.config import SourceConfig
from rlhf_dist.rewards.load import load_function
from rlhf_dist.rewards.reasoning_gym import answer_json

RawRow = dict[str, Any]
ROW_KINDS = ("prompts", "examples", "preferences")


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Which field of a raw row holds what."""

    prompt: str
    response: str
    answer: str
    chosen: str = "chosen"
    rejected: str = "rejected"
    margin: str = "margin"

    def needed(self, rows: str) -> tuple[str, ...]:
        """Fields that rows of this kind cannot do without."""
        return {
            "prompts": (self.prompt,),
            "examples": (self.prompt, self.response),
            "preferences": (self.prompt, self.chosen, self.rejected),
        }[rows]


def fields_of(config: SourceConfig) -> Fields:
    """Field names of the config; those of reasoning-gym entries are fixed, whatever the config says."""
    if config.generator is not None and ":" not in config.generator:
        return Fields(prompt="prompt", response="response", answer="answer")
    return Fields(prompt=config.prompt_key, response=config.response_key, answer=config.answer_key)


def read_rows(config: SourceConfig, seed: int, limit: int | None = None) -> list[RawRow]:
    """All raw rows, or the first `limit`. Generators draw from generator_args.seed, else from `seed`.

    Raises ValueError for a missing file, a line that is not JSON, an unknown generator, wrong arguments of
    one, or a row without a field it needs (named with its row number).
    """
    check_kind(config)
    if config.path is not None:
        rows, place = _read_file(Path(config.path).expanduser(), limit), config.path
    else:
        assert config.generator is not None, "check_kind saw exactly one of path and generator"
        rows, place = _generate(config, seed, limit), config.generator
    if not rows:
        raise ValueError(f"{place} has no rows")
    for number, row in enumerate(rows):
        _check_fields(row, fields_of(config).needed(config.rows), f"row {number} of {place}")
    return rows


def check_kind(config: SourceConfig) -> None:
    """Raises ValueError unless exactly one of path and generator is set and `rows` is known."""
    if (config.path is None) == (config.generator is None):
        raise ValueError(
            f"set exactly one of path and generator, got path={config.path!r} and generator={config.generator!r}"
        )
    if config.rows not in ROW_KINDS:
        raise ValueError(
            f"rows must be one of {', '.join(ROW_KINDS)}, got {config.rows!r}{near(config.rows, ROW_KINDS)}"
        )
    if config.generator is not None and config.size < 1:
        raise ValueError(f"size must be >= 1 for a generator, got {config.size}")


def near(name: str, names: Sequence[str]) -> str:
    """`; did you mean ...?` where one of the names is close, else nothing."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_fields(row: Any, needed: Sequence[str], place: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be an object with named fields, got {str(row)[:80]!r}")
    for name in needed:
        if row.get(name) is None:
            raise ValueError(
                f"{place} has nothing under {name!r}, only {', '.join(row) or 'none'}{near(name, list(row))}"
            )


def _read_file(path: Path, limit: int | None) -> list[RawRow]:
    if not path.is_file():
        raise ValueError(f"no data file {str(path)!r} (looked for {path.resolve()})")
    if path.suffix == ".parquet":
        return _read_parquet(path, limit)
    if path.suffix in (".jsonl", ".json"):
        return _read_jsonl(path, limit)
    raise ValueError(f"a data file is .parquet or .jsonl, got {str(path)!r}")


def _read_parquet(path: Path, limit: int | None) -> list[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if limit is None:
            rows: list[RawRow] = file.read().to_pylist()
            return rows
        batch = next(file.iter_batches(batch_size=limit), None)
        return [] if batch is None else list(batch.to_pylist())
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def _read_jsonl(path: Path, limit: int | None) -> list[RawRow]:
    rows: list[RawRow] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(rows) >= limit:
                break
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error.msg} at column {error.colno})") from error
    return rows


def _generate(config: SourceConfig, seed: int, limit: int | None) -> list[RawRow]:
    assert config.generator is not None, "only called for generators"
    count = config.size if limit is None else min(limit, config.size)
    if ":" not in config.generator:
        return _reasoning_gym(config, seed, count)
    function = load_function(config.generator)
    try:
        return [function(index, **config.generator_args) for index in range(count)]
    except TypeError as error:
        raise ValueError(
            f"generator {config.generator!r} must be a function (index, **generator_args) -> dict; called with "
            f"generator_args {config.generator_args} it raised: {error}"
        ) from error


def _reasoning_gym(config: SourceConfig, seed: int, count: int) -> list[RawRow]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    assert config.generator is not None, "only called for generators"
    name, arguments = config.generator, {"seed": seed, **config.generator_args, "size": config.size}
    if name not in DATASETS:
        raise ValueError(
            f"no reasoning-gym data set {name!r}{near(name, list(DATASETS))} (a function of your own is file.py:name)"
        )
    try:
        entries = reasoning_gym.create_dataset(name, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"reasoning-gym's {name!r} refuses generator_args {config.generator_args}: {error}") from error
    rows = []
    for index in range(count):
        entry = entries[index]
        rows.append({"prompt": entry["question"], "response": entry["answer"], "answer": answer_json(name, entry)})
    return rows
