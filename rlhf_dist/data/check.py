"""What the driver checks of a source before anything starts: its first rows are read, rendered and tokenised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from rlhf_dist.config import SourceConfig
from rlhf_dist.data.ends import Ends, ends_of
from rlhf_dist.data.fields import USUAL
from rlhf_dist.data.forms import item_of
from rlhf_dist.data.load import Limits, Loaded, load
from rlhf_dist.data.read import FIRST, Part, parts_of, read
from rlhf_dist.data.tokenizer import TextTokenizer

MORE = 2048
"""Rows looked at where none of the first is short enough."""


def check_source(
    config: SourceConfig,
    where: str,
    *,
    tokenizer: str | Path | None = None,
    seed: int = 0,
    max_prompt_tokens: int | None = None,
    max_response_tokens: int = 0,
    fields: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """A line for people about each part of the source.

    Raises ValueError, beginning with `where` (e.g. "data.train"), for what a user can get wrong: a file or generator
    that is missing (with the nearest name), arguments a generator refuses, fields that the first rows lack, rows of
    another form, chat messages that the template of the `tokenizer` folder does not take, prompts that are all longer
    than `max_prompt_tokens` (None: not looked at).
    """
    try:
        parts = parts_of(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    lines = []
    for part in parts:
        try:
            if tokenizer is None:
                _check_forms(part, seed)
                continue
            text = TextTokenizer(tokenizer, config.template_args)
            ends = ends_of(tokenizer, text)
            limits = Limits(prompt_tokens=max_prompt_tokens or 1 << 40, response_tokens=max_response_tokens)
            loaded = load(part, seed, text, ends, limits, FIRST, fields)
            if loaded.items is None:
                loaded = load(part, seed, text, ends, limits, MORE, fields)
            if loaded.items is None:
                raise ValueError(
                    f"none of the first {loaded.counts.rows} prompts has at most max_prompt_tokens = "
                    f"{max_prompt_tokens} tokens (the shortest has {loaded.counts.shortest_prompt}); "
                    "raise data.max_prompt_tokens or use shorter prompts"
                )
            lines.append(f"{where.removeprefix('data.')}: {_line(loaded, text, ends, limits)}")
        except ValueError as error:
            raise ValueError(f"{where}: {part.key}{error}") from error
    return lines


def field_names(config: SourceConfig, seed: int) -> set[str]:
    """Fields of the source's first rows that no column has under another name. Raises ValueError as `check_source`."""
    found: set[str] = set()
    for part in parts_of(config):
        raw = read(part.config, seed, FIRST)
        for _, row in raw.rows:
            found |= set(item_of(row, raw.fields, part.config).extra)
    return found


def _check_forms(part: Part, seed: int) -> None:
    raw = read(part.config, seed, FIRST)
    for place, row in raw.rows:
        try:
            item_of(row, raw.fields, part.config)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def _line(loaded: Loaded, tokenizer: TextTokenizer, ends: Ends, limits: Limits) -> str:
    config, counts = loaded.part.config, loaded.counts
    name = config.path or str(config.generator)
    weight = "" if loaded.part.weight is None else f", weight {loaded.part.weight:g}"
    form = "chat messages" if loaded.chat else "plain text"
    parts = [f"{name}{weight} ({form}); of its first {counts.rows} rows"]
    parts.append(f"prompts {counts.shortest_prompt} to {counts.longest_prompt} tokens of {limits.prompt_tokens}")
    if counts.too_long:
        parts.append(f"{counts.too_long} too long (left out)")
    if config.rows != "prompts":
        parts.append(f"responses up to {counts.longest_response} of {limits.response_tokens}")
        parts.append(f"{counts.cut} cut" if counts.cut else "")
        shown = " or ".join(tokenizer.token(one) for one in ends.ids)
        parts.append(f"end of text {shown}")
    else:
        missing, usable = counts.without_answer, counts.rows - counts.too_long
        key = config.answer_key or " or ".join(USUAL["answer"])
        parts.append(f"{missing} of {usable} without an answer ({key})" if missing else "all have an answer")
    return ", ".join(part for part in parts if part)
