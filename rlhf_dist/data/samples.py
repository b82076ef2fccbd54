"""Rows of a source as people look at them: what is given, what is learnt, what lies between, with token counts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

from rlhf_dist.batch import Batch
from rlhf_dist.config import DataConfig
from rlhf_dist.data.source import PromptSource
from rlhf_dist.data.tokenizer import TextTokenizer

Kind = Literal["prompt", "trained", "context"]


@dataclass(frozen=True)
class Segment:
    """Tokens in a row that are treated alike, as text."""

    kind: Kind
    """`context` stands among the responses and is not learnt."""
    text: str
    tokens: int


@dataclass(frozen=True)
class Sample:
    """One row."""

    title: str
    segments: tuple[Segment, ...]
    answer: str | None
    """Ground truth; None where the rows have responses of their own."""


def samples(source: PromptSource, step: int, rows: int, rows_per_step: int) -> list[Sample]:
    """The first `rows` items of step `step`, in order. rows_per_step: items of a step."""
    position = step * rows_per_step + np.arange(rows, dtype=np.int64)
    items = np.repeat(source.items_at(position), source.rows_per_item)
    batch, found = source.take(position), []
    for row, item in enumerate(items):
        segments = _segments(batch, row, source.tokenizer)
        title = [source.place(int(item))]
        if "label" in batch:
            title.append("chosen" if batch["label"].row(row) > 0 else "rejected")
        title += [f"{segment.tokens} {segment.kind}" for segment in _summed(segments)]
        answer = None
        if "response_ids" in batch:
            title.append(_ending(batch["response_ids"].row(row), source))
        else:
            answer = str(batch["answer"].row(row))
        found.append(Sample(", ".join(title), tuple(segments), answer))
    return found


def summary(source: PromptSource, data: DataConfig, rows_per_step: int) -> list[str]:
    """All rows of a source in a few lines. rows_per_step: items of a step."""
    counts, rows = source.counts, source.every()
    left_out = {"too long": counts.too_long, "held out": counts.heldout}
    shown = ", ".join(f"{number:,} {why}" for why, number in left_out.items() if number)
    lines = [f"rows         {source.size:,} of {counts.rows:,} are used" + (f"; {shown}" if shown else "")]
    if source.mixture is not None:
        total = source.mixture.counts.sum()
        shares = zip(source.parts, source.mixture.counts, strict=True)
        lines.append("mixture      " + ", ".join(f"{one.part.name} {count / total:.1%}" for one, count in shares))
    setting = "data.prompts_per_step" if rows_per_step == data.prompts_per_step else "rows_per_step"
    lines.append(f"epoch        {-(-source.size // rows_per_step):,} steps of {rows_per_step} ({setting})")
    lines.append(f"prompts      {_range(rows['prompt_ids'].lengths)} tokens, at most {data.max_prompt_tokens}")
    if "response_ids" in rows:
        trained = int(rows["response_mask"].values.sum(dtype=np.int64))
        cut = f"; {counts.cut:,} cut" if counts.cut else ""
        lines.append(
            f"responses    {_range(rows['response_ids'].lengths)} tokens, at most {data.max_response_tokens}{cut}"
        )
        lines.append(f"trained      {trained:,} of {len(rows['response_mask'].values):,} response tokens")
    else:
        missing = counts.without_answer
        lines.append(f"answers      {f'{missing:,} rows have none' if missing else 'in every row'}")
    ends = ", ".join(f"{source.tokenizer.token(one)} ({one})" for one in source.ends.ids) or "nothing"
    return [*lines, f"end of text  {ends}"]


def _segments(batch: Batch, row: int, tokenizer: TextTokenizer) -> list[Segment]:
    prompt = batch["prompt_ids"].row(row).tolist()
    segments = [Segment("prompt", tokenizer.decode(prompt), len(prompt))]
    if "response_ids" not in batch:
        return segments
    pairs = zip(batch["response_ids"].row(row).tolist(), batch["response_mask"].row(row).tolist(), strict=True)
    for learnt, run in groupby(pairs, key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        segments.append(Segment("trained" if learnt else "context", tokenizer.decode(ids), len(ids)))
    return segments


def _summed(segments: list[Segment]) -> list[Segment]:
    """One segment of each kind, with all its tokens."""
    kinds = dict.fromkeys(segment.kind for segment in segments)
    return [Segment(kind, "", sum(one.tokens for one in segments if one.kind == kind)) for kind in kinds]


def _ending(ids: np.ndarray, source: PromptSource) -> str:
    last = int(ids[-1])
    if last in source.ends.ids:
        return f"ends with {source.tokenizer.token(last)} ({last})"
    return "cut: no end of text"


def _range(lengths: np.ndarray) -> str:
    return f"{lengths.min():,} to {lengths.max():,} (mean {lengths.mean():,.1f})"
