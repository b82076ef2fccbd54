"""Sources: rows for step s are a pure function of (config, seed, s), so a run resumes without any state of theirs.

    position   s * rows + shift + i              i-th row of step s; shift: 0 unless a resumed run has other rows
    draw       position, or its part's own count of them where a mixture has weights (mixture.py)
    epoch      draw // size                      a new order each epoch, drawn from (seed, epoch[, part])
    row        order[epoch][draw % size]

All rows are read and tokenised once, at construction: prompts that are too long are dropped and counted
there, so each epoch holds every usable row exactly once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from rlhf_dist.batch import Batch, Column, IntArray
from rlhf_dist.config import SourceConfig
from rlhf_dist.data.ends import ends_of
from rlhf_dist.data.load import Counts, Limits, Loaded, load
from rlhf_dist.data.mixture import Mixture
from rlhf_dist.data.read import parts_of
from rlhf_dist.data.tokenizer import TextTokenizer

_EMITTED = {
    "prompts": (),
    "examples": ("response_ids", "response_mask"),
    "preferences": ("response_ids", "response_mask", "label", "margin"),
}


def emitted_columns(rows: str) -> tuple[str, ...]:
    """Columns that a source of this kind (SourceConfig.rows) emits. Raises ValueError for another kind."""
    if rows not in _EMITTED:
        raise ValueError(f"rows must be one of {', '.join(_EMITTED)}, got {rows!r}")
    return ("group_id", "prompt_ids", "prompt", "answer", "source", "fields", *_EMITTED[rows])


class PromptSource:
    """Rows of one SourceConfig: prompts, examples (with a response) or preferences (two labelled rows each)."""

    def __init__(
        self,
        config: SourceConfig,
        *,
        tokenizer: str | Path,
        seed: int,
        max_prompt_tokens: int,
        max_response_tokens: int = 0,
        exclude: Collection[str] = (),
        fields: Mapping[str, str] = MappingProxyType({}),
        first_group: int = 0,
    ) -> None:
        """Reads and tokenises everything.

        fields: columns of their own (`Prompts.fields`). first_group: what group ids are counted from.

        Rows whose prompt is in `exclude` (the `prompt` column of held-out rows) are left out and counted.
        `max_response_tokens` cuts given responses, their end-of-text token included; 0 for no limit.
        Raises ValueError for what is wrong with the config, the file, a row or the tokenizer, and if every
        prompt of a part is too long.
        """
        self.seed, self.shuffle, self.rows_per_item = seed, config.shuffle, config.rows_per_item
        self._first_group = first_group
        self.tokenizer = TextTokenizer(tokenizer, config.template_args)
        self.ends = ends_of(tokenizer, self.tokenizer)
        limits = Limits(prompt_tokens=max_prompt_tokens, response_tokens=max_response_tokens, exclude=exclude)
        self.parts: list[Loaded] = []
        for part in parts_of(config):
            try:
                loaded = load(part, seed, self.tokenizer, self.ends, limits, fields=fields)
                _check_usable(loaded, max_prompt_tokens)
            except ValueError as error:
                raise ValueError(f"{part.key}{error}") from error
            self.parts.append(loaded)
        self.counts = Counts()
        """Of all parts together."""
        for loaded in self.parts:
            self.counts.add(loaded.counts)
        batches = [loaded.items for loaded in self.parts if loaded.items is not None]
        self._starts = np.cumsum([0, *(batch.num_rows // self.rows_per_item for batch in batches)])
        whole = Batch.concat(batches)
        self._places, self._items = whole["place"], whole.drop("place")
        self.size = int(self._starts[-1])
        """Usable rows (pairs, for preferences) of all parts: an epoch, where parts have no weights."""
        weights = [loaded.part.weight for loaded in self.parts]
        self.mixture = Mixture([weight for weight in weights if weight is not None]) if all(weights) else None

    @property
    def prompts(self) -> frozenset[str]:
        """All prompts, as in the `prompt` column."""
        return frozenset(self._items["prompt"].rows())

    def place(self, item: int) -> str:
        """Where an item was read."""
        return str(self._places.row(item * self.rows_per_item))

    def emit(self, step: int, rows: int, shift: int = 0) -> Batch:
        """The `rows` items of step `step` (twice as many rows for preferences: chosen, rejected, chosen, ...).

        group_id is step * rows + shift + i, the same for both rows of a pair. A run that goes on with other `rows` goes
        on at the row where it stopped, which `shift` sees to. Raises ValueError for a negative step or rows < 1.
        """
        if step < 0 or rows < 1:
            raise ValueError(f"a source emits rows >= 1 for a step >= 0, got step {step} and {rows} rows")
        position = step * rows + shift + np.arange(rows, dtype=np.int64)
        return self.take(position)

    def take(self, position: IntArray) -> Batch:
        """The items at these positions of the run; group_id is the position."""
        return self._batch(self.items_at(position), position)

    def every(self) -> Batch:
        """Every item once, in the order of the first epoch where there is one."""
        position = np.arange(self.size, dtype=np.int64)
        return self._batch(position if self.mixture else self.items_at(position), position)

    def items_at(self, position: IntArray) -> IntArray:
        """The item that each position of the run draws."""
        if self.mixture is None:
            return self._draw(position, 0, self.size, [self.seed])
        part, draw = self.mixture.at(position)
        item = np.empty(len(position), dtype=np.int64)
        for one in np.unique(part):
            start, stop = (int(edge) for edge in self._starts[one : one + 2])
            here = part == one
            item[here] = self._draw(draw[here], start, stop - start, [self.seed, int(one)])
        return item

    def epochs(self, position: int) -> dict[str, float]:
        """Passes over the rows made before `position`: `epoch`, and one for each part of a weighted mixture."""
        passes = {"epoch": position / self.size}
        if self.mixture is not None:
            sizes, drawn = np.diff(self._starts), self.mixture.drawn(position)
            for loaded, count, size in zip(self.parts, drawn, sizes, strict=True):
                passes[f"epoch_{loaded.part.name}"] = float(count / size)
        return passes

    def _draw(self, draw: IntArray, start: int, size: int, seed: list[int]) -> IntArray:
        """Items [start, start + size) in a new order each epoch."""
        epoch, within = draw // size, draw % size
        item = np.empty(len(draw), dtype=np.int64)
        for one in np.unique(epoch):
            here = epoch == one
            order = np.random.default_rng([*seed, int(one)]).permutation(size) if self.shuffle else np.arange(size)
            item[here] = start + order[within[here]]
        return item

    def _batch(self, item: IntArray, position: IntArray) -> Batch:
        row = np.repeat(item * self.rows_per_item, self.rows_per_item)
        row += np.tile(np.arange(self.rows_per_item), len(item))
        groups = np.repeat(position + self._first_group, self.rows_per_item)
        return self._items.take(row).with_columns(group_id=Column(groups))


def _check_usable(loaded: Loaded, max_prompt_tokens: int) -> None:
    counts = loaded.counts
    if loaded.items is not None:
        return
    if counts.heldout == counts.rows:
        raise ValueError(
            f"every one of {counts.rows} prompts is held out too; use other rows for training than for data.heldout"
        )
    raise ValueError(
        f"every one of {counts.rows - counts.heldout} prompts is longer than max_prompt_tokens = {max_prompt_tokens} "
        f"(the shortest has {counts.shortest_prompt} tokens); raise it or use shorter prompts"
    )
