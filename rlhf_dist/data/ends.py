"""The tokens that end a text: one set for what sources append, what generation stops at, and what exports say.

Files of one model often name different ones, and each is the end for somebody. The set is the union of

    generation_config.json   eos_token_id       where transformers stops
    config.json              eos_token_id       the older place
    tokenizer_config.json    eos_token          what fine-tuning appends
    chat template            the special token that stands behind what the assistant says
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_dist.data.tokenizer import TextTokenizer

_PROBE = "rlhf"


@dataclass(frozen=True)
class Ends:
    """The end-of-text tokens of a model folder."""

    ids: tuple[int, ...]
    """All of them, in the order of the table above; empty where nothing names one."""
    appended: int | None
    """What a source puts behind a text that has no end: the tokenizer's own, else the first."""


def end_token_ids(folder: str | Path) -> list[int]:
    """Ids that end a response of the model in `folder`; may be none."""
    has_tokenizer = (Path(folder) / "tokenizer.json").is_file()
    return list(ends_of(folder, TextTokenizer(folder) if has_tokenizer else None).ids)


def ends_of(folder: str | Path, tokenizer: TextTokenizer | None) -> Ends:
    """The union described above. Raises ValueError for a file that is not JSON."""
    found = [*_configured(Path(folder), "generation_config.json"), *_configured(Path(folder), "config.json")]
    own = None if tokenizer is None else tokenizer.eos_id
    turn = None if tokenizer is None else _end_of_turn(tokenizer)
    ids = tuple(dict.fromkeys([*found, *(one for one in (own, turn) if one is not None)]))
    return Ends(ids, own if own is not None else next(iter(ids), None))


def _configured(folder: Path, name: str) -> list[int]:
    file = folder / name
    if not file.is_file():
        return []
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    found: Any = settings.get("eos_token_id")
    if found is None and isinstance(settings.get("text_config"), dict):
        found = settings["text_config"].get("eos_token_id")
    return [] if found is None else [int(token) for token in (found if isinstance(found, list) else [found])]


def _end_of_turn(tokenizer: TextTokenizer) -> int | None:
    """The special token that the chat template puts behind an assistant's message; None where it puts none."""
    if not tokenizer.has_chat_template:
        return None
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.render(messages, generation_prompt=False)
    except ValueError:  # a template for messages of another kind
        return None
    _, found, behind = text.rpartition(_PROBE)
    ids = tokenizer.encode([behind.lstrip()], special_tokens=False)[0] if found else []
    return ids[0] if ids and tokenizer.is_special(ids[0]) else None
