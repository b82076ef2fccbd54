"""Which field of a raw row holds what: nested names, what is there by default, and what a misspelt name is told."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_dist.config import SourceConfig
from rlhf_dist.data.files import Placed, RawRow

CONVERSATIONS = ("messages", "conversations")
"""Fields that hold a whole conversation, the assistant's turns among it."""
USUAL = {
    "prompt": ("prompt", *CONVERSATIONS),
    "response": ("response", "completion"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "answer": ("answer", "reward_model.ground_truth"),
}
"""Names that are looked for where a key is None, the first that is there."""
MARGIN = "margin"
"""Field with the strength of a preference."""
READ = {
    "prompts": ("prompt", "answer"),
    "examples": ("prompt", "response", "answer"),
    "preferences": ("prompt", "chosen", "rejected", "answer"),
}
"""What rows of a kind are read for."""
WHAT = {"prompts": "prompts", "examples": "examples (prompt and response)", "preferences": "preferences"}


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Where a row has what; None for what it does not have."""

    prompt: str | None
    response: str | None
    chosen: str | None
    rejected: str | None
    answer: str | None

    @property
    def conversation(self) -> bool:
        """Whether the prompt's field holds the response too."""
        whole = self.prompt is not None and self.prompt.rpartition(".")[2] in CONVERSATIONS
        return self.response == self.prompt or (whole and self.response is None)

    def names(self) -> set[str]:
        """Outermost fields that are used."""
        used = (self.prompt, self.response, self.chosen, self.rejected, self.answer, MARGIN)
        return {name.partition(".")[0] for name in used if name} | {name for name in used if name}


def value_of(row: RawRow, name: str | None) -> Any:
    """The value under `name`, which may be nested (`reward_model.ground_truth`); None where there is none."""
    if name is None:
        return None
    if name in row:
        return row[name]
    found: Any = row
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            return None
        found = found[part]
    return found


def near(name: str, names: Sequence[str]) -> str:
    """`; did you mean ...?` where one of the names is close, else nothing."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def find_fields(config: SourceConfig, first: Sequence[Placed]) -> Fields:
    """The fields of rows like `first`, for rows of the kind `config.rows`.

    Raises ValueError for a key that none of them has (with the nearest name), and for rows of another form than the
    kind needs, naming what they have.
    """
    found = {what: _field(config, what, first) for what in USUAL}
    if found["chosen"] is None and found["rejected"] is None and not config.response_key:
        _refuse_unpaired(config, first)
    if config.rows == "examples" and not config.prompt_key and found["response"] is None:
        # A conversation beside a copy of its prompt.
        found["prompt"] = next((name for name in CONVERSATIONS if _has(first, name)), found["prompt"])
    for what in _needed(config.rows, found["prompt"]):
        if found[what] is None:
            raise ValueError(
                f"{first[0].place} has nothing under {' or '.join(map(repr, USUAL[what]))}, which {WHAT[config.rows]} "
                f"need; it has {_names(first)}; set {what}_key"
            )
    return Fields(**found)


def _needed(rows: str, prompt: str | None) -> tuple[str, ...]:
    if rows == "preferences":
        return ("chosen", "rejected")
    whole = prompt is not None and prompt.rpartition(".")[2] in CONVERSATIONS
    return ("prompt",) if whole or rows == "prompts" else ("prompt", "response")


def _field(config: SourceConfig, what: str, first: Sequence[Placed]) -> str | None:
    asked: str | None = getattr(config, f"{what}_key")
    if asked is None:
        return next((name for name in USUAL[what] if _has(first, name)), None)
    if what in READ[config.rows] and not _has(first, asked):
        raise ValueError(
            f"{what}_key={asked!r} is in none of the first {len(first)} rows ({first[0].place}, ...), which have "
            f"{_names(first)}{near(asked, _flat(first))}"
        )
    return asked


def _has(first: Sequence[Placed], name: str) -> bool:
    return any(value_of(row, name) is not None for _, row in first)


def _refuse_unpaired(config: SourceConfig, first: Sequence[Placed]) -> None:
    """Rows that say of one response whether it is good: training on all of them would train on the bad ones."""
    if config.rows != "prompts" and any(isinstance(row.get("label"), bool) for _, row in first):
        raise ValueError(
            f"{first[0].place} has an unpaired preference (`label` true or false), which needs a loss on single "
            f"labelled responses; this recipe takes {WHAT[config.rows]}. Make pairs (chosen, rejected) of the rows, or "
            "keep those with label true, without the field, to imitate them"
        )


def _names(first: Sequence[Placed]) -> str:
    return ", ".join(_flat(first)) or "no fields"


def _flat(first: Sequence[Placed]) -> list[str]:
    """Names of the fields of the first rows, nested ones with a dot."""
    return list(dict.fromkeys(name for _, row in first for name in _nested(row, "")))


def _nested(row: RawRow, prefix: str) -> Iterator[str]:
    for name, value in row.items():
        if isinstance(value, dict) and value:
            yield from _nested(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}"
