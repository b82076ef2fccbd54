"""Whether two model folders mean the same by a token id, from their tokenizer.json alone.

A batch holds the ids of one tokenizer, the one its prompts were encoded with. A critic, a reference or a reward model
with another vocabulary would read other words, and say nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_dist.typed import ConfigError


def check_vocabulary(path: str, key: str, base: str, base_key: str) -> None:
    """Raise ConfigError unless every token of `base`'s vocabulary has the same id in `path`'s, which may have more.

    Both are model folders, named by the settings `base_key` and `key`.
    """
    file, base_file = (Path(folder).expanduser() / "tokenizer.json" for folder in (path, base))
    if file.resolve() == base_file.resolve() or not base_file.is_file():
        return
    if not file.is_file():
        raise ConfigError(
            f"{key}={path} has no tokenizer.json, so nothing says that it means by a token id what {base_key} means; "
            f"save its tokenizer there, or the one of {base} if it is the same"
        )
    if file.read_bytes() == base_file.read_bytes():
        return
    ours, theirs = _tokens(base_file), _tokens(file)
    other = sorted((number, token) for token, number in ours.items() if theirs.get(token) != number)
    if other:
        number, token = other[0]
        at = {number: token for token, number in theirs.items()}.get(number)
        there = "no token" if at is None else repr(at)
        raise ConfigError(
            f"{key}={path} would read the token ids of {base_key}={base}, and has another vocabulary: {len(other)} of "
            f"{len(ours)} tokens have another id, e.g. {number} is {token!r} in the latter and {there} in the former; "
            f"use a model with that vocabulary (a reward may also be a function, which gets the text)"
        )


def _tokens(file: Path) -> dict[str, int]:
    """Token -> id, added ones included."""
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = settings["model"]["vocab"]
        if isinstance(vocabulary, list):  # a unigram model: [token, score], by id
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **{token["content"]: token["id"] for token in settings.get("added_tokens") or ()}}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} is no tokenizer ({type(error).__name__}: {error}); save the tokenizer again"
        ) from error
