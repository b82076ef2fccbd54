"""Raw rows of a source, each with its place: from files or a generator; and the parts of a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path

from rlhf_dist.config import PartConfig, SourceConfig
from rlhf_dist.data.fields import Fields, find_fields, near
from rlhf_dist.data.files import Placed, data_files, read_files
from rlhf_dist.data.generate import generate

ROW_KINDS = ("prompts", "examples", "preferences")
FIRST = 64
"""Rows in which a field must be found; what `check` renders."""
FIRST_GENERATED = 8


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a source: all of it, or one entry of its mixture."""

    name: str
    """For the `source` column: the mixture's name for it, else the file's or generator's."""
    key: str
    """What to put before a message about it; "" for a source without a mixture."""
    weight: float | None
    config: SourceConfig


@dataclass(frozen=True)
class Raw:
    """Rows to come, and their fields."""

    fields: Fields
    rows: Iterator[Placed]


def parts_of(config: SourceConfig) -> list[Part]:
    """The parts of a source. Raises ValueError for settings that contradict each other."""
    if config.rows not in ROW_KINDS:
        raise ValueError(
            f"rows must be one of {', '.join(ROW_KINDS)}, got {config.rows!r}{near(config.rows, ROW_KINDS)}"
        )
    given = {"path": config.path, "generator": config.generator, "mix": list(config.mix) or None}
    if sum(value is not None for value in given.values()) != 1:
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        raise ValueError(f"set exactly one of path, generator and mix, got {shown or 'none'}")
    if not config.mix:
        return [Part(name=_name(config), key="", weight=None, config=_checked(config, ""))]
    weights = {name: part.weight for name, part in config.mix.items()}
    if None in weights.values() and any(weight is not None for weight in weights.values()):
        without = ", ".join(name for name, weight in weights.items() if weight is None)
        raise ValueError(f"either all parts of mix have a weight or none has, got none for {without}")
    for name, weight in weights.items():
        if weight is not None and not 0 < weight < float("inf"):
            raise ValueError(f"mix.{name}.weight must be above 0, got {weight:g}; leave the part out instead")
    return [
        Part(name=name, key=f"mix.{name}: ", weight=part.weight, config=_checked(_merged(config, part), f"mix.{name}."))
        for name, part in config.mix.items()
    ]


def read(config: SourceConfig, seed: int, limit: int | None = None) -> Raw:
    """Rows of a part (its `config`), or the first `limit`, and where their fields are.

    Raises ValueError for a missing file, a first row of another form, an unknown generator or wrong arguments of
    one; while the rows are drawn for what cannot be read, with file and line.
    """
    if config.path is not None:
        rows, ahead = read_files(data_files(config.path)), FIRST
    else:
        rows, ahead = generate(config, seed), FIRST_GENERATED
    if limit is not None:
        rows = islice(rows, limit)
    first, failure = list[Placed](), None
    try:
        for placed in islice(rows, ahead):
            first.append(placed)
    except ValueError as error:  # Raised where it stands, unless there is nothing before it.
        failure = error
    if failure is not None and not first:
        raise failure
    if not first:
        raise ValueError(f"{config.path or config.generator} has no rows")
    return Raw(find_fields(config, first), _again(first, rows, failure))


def _again(first: list[Placed], rest: Iterator[Placed], failure: Exception | None) -> Iterator[Placed]:
    yield from first
    if failure is not None:
        raise failure
    yield from rest


def _merged(config: SourceConfig, part: PartConfig) -> SourceConfig:
    own = {item.name: getattr(part, item.name) for item in fields(part) if item.name != "weight"}
    given = {name: value for name, value in own.items() if value is not None}
    return replace(config, mix={}, **given)


def _checked(config: SourceConfig, key: str) -> SourceConfig:
    if (config.path is None) == (config.generator is None):
        raise ValueError(
            f"{key}set exactly one of path and generator, got path={config.path!r} and generator={config.generator!r}"
        )
    if config.generator is not None and config.size < 1:
        raise ValueError(f"{key}size must be >= 1 for a generator, got {config.size}")
    return config


def _name(config: SourceConfig) -> str:
    return Path(config.path).stem if config.path else str(config.generator).rpartition(":")[2]
