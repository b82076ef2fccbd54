"""Sources: rows for step s are a pure function of (config, seed, s), so a run resumes without any state of theirs.

    position   s * rows + i                      i-th row of step s
    epoch      position // size                  a new order each epoch, drawn from (seed, epoch)
    row        order[epoch][position % size]

All rows are read and tokenised once, at construction: prompts that are too long are dropped and counted
there, so each epoch holds every usable row exactly once.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_dist.batch import Batch, Column, IntArray
from rlhf_dist.config import SourceConfig
from rlhf_dist.data.read import Fields, RawRow, fields_of, read_rows
from rlhf_dist.data.tokenizer import Messages, TextTokenizer, missing_template

_EMITTED = {
    "prompts": (),
    "examples": ("response_ids", "response_mask"),
    "preferences": ("response_ids", "response_mask", "label", "margin"),
}


def emitted_columns(rows: str) -> tuple[str, ...]:
    """Columns that a source of this kind (SourceConfig.rows) emits. Raises ValueError for another kind."""
    if rows not in _EMITTED:
        raise ValueError(f"rows must be one of {', '.join(_EMITTED)}, got {rows!r}")
    return ("group_id", "prompt_ids", "prompt", "answer", "source", *_EMITTED[rows])


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
    ) -> None:
        """Reads and tokenises everything.

        Rows whose prompt is in `exclude` (the `prompt` column of held-out rows) are left out and counted.
        `max_response_tokens` cuts given responses, their end-of-sequence token included; 0 for no limit.
        Raises ValueError for what is wrong with the config, the file, a row or the tokenizer, and if every
        prompt is too long.
        """
        self.seed = seed
        self.shuffle = config.shuffle
        self.rows_per_item = 2 if config.rows == "preferences" else 1
        raw = read_rows(config, seed)
        fields, text = fields_of(config), TextTokenizer(tokenizer)
        prompts = [_prompt(row[fields.prompt], config, number) for number, row in enumerate(raw)]
        seen = [index for index, prompt in enumerate(prompts) if _readable(prompt) not in exclude]
        self.prompts_heldout = len(raw) - len(seen)
        """Rows left out because they are held out."""
        if not seen:
            raise ValueError(
                f"every one of {len(raw)} prompts is held out too; use other rows for training than for data.heldout"
            )
        raw, prompts = [raw[index] for index in seen], [prompts[index] for index in seen]
        prompt_ids = _encode_prompts(prompts, text)

        short = [index for index, ids in enumerate(prompt_ids) if len(ids) <= max_prompt_tokens]
        self.size = len(short)
        """Rows (pairs, for preferences) of one epoch."""
        self.prompts_too_long = len(raw) - len(short)
        """Rows dropped because of max_prompt_tokens."""
        if not short:
            raise ValueError(
                f"every one of {len(raw)} prompts is longer than max_prompt_tokens = {max_prompt_tokens} "
                f"(the shortest has {min(map(len, prompt_ids))} tokens); raise it or use shorter prompts"
            )
        name = Path(config.path).stem if config.path else str(config.generator).rpartition(":")[2]
        columns = {
            "prompt_ids": Column.ragged([prompt_ids[index] for index in short], dtype=np.int32),
            "prompt": Column.strings([_readable(prompts[index]) for index in short]),
            "answer": Column.strings([_text(raw[index].get(fields.answer)) for index in short]),
            "source": Column.strings([name] * len(short)),
        }
        self._items = Batch(columns).repeat(self.rows_per_item)
        self.responses_cut = 0
        """Given responses cut at max_response_tokens."""
        if config.rows != "prompts":
            self._add_responses([raw[index] for index in short], fields, config.rows, text, max_response_tokens)

    @property
    def prompts(self) -> frozenset[str]:
        """All prompts, as in the `prompt` column."""
        return frozenset(self._items["prompt"].rows())

    def emit(self, step: int, rows: int) -> Batch:
        """The `rows` items of step `step` (twice as many rows for preferences: chosen, rejected, chosen, ...).

        group_id is step * rows + i, the same for both rows of a pair. The same `rows` must be used for all
        steps of a run. Raises ValueError for a negative step or rows < 1.
        """
        if step < 0 or rows < 1:
            raise ValueError(f"a source emits rows >= 1 for a step >= 0, got step {step} and {rows} rows")
        position = step * rows + np.arange(rows, dtype=np.int64)
        epoch, within = position // self.size, position % self.size
        item = np.empty(rows, dtype=np.int64)
        for one in np.unique(epoch):
            here = epoch == one
            item[here] = self._order(int(one))[within[here]]
        row = np.repeat(item * self.rows_per_item, self.rows_per_item)
        row += np.tile(np.arange(self.rows_per_item), rows)
        return self._items.take(row).with_columns(group_id=Column(np.repeat(position, self.rows_per_item)))

    def _order(self, epoch: int) -> IntArray:
        if not self.shuffle:
            return np.arange(self.size)
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)

    def _add_responses(
        self, raw: Sequence[RawRow], fields: Fields, rows: str, tokenizer: TextTokenizer, limit: int
    ) -> None:
        keys = (fields.response,) if rows == "examples" else (fields.chosen, fields.rejected)
        texts = [_response(row[key], key) for row in raw for key in keys]
        if tokenizer.eos_id is None:
            raise ValueError(f"the tokenizer in {tokenizer.folder} names no eos_token, which ends every given response")
        whole = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode(texts, special_tokens=False)]
        self.responses_cut = sum(len(ids) > limit for ids in whole) if limit else 0
        response_ids = Column.ragged([ids[:limit] if limit else ids for ids in whole], dtype=np.int32)
        mask = Column(np.ones(len(response_ids.values), dtype=np.uint8), response_ids.offsets)
        self._items = self._items.with_columns(response_ids=response_ids, response_mask=mask)
        if rows == "preferences":
            margin = np.array([row.get(fields.margin) or 0.0 for row in raw], dtype=np.float32)
            self._items = self._items.with_columns(
                label=Column(np.tile(np.array([1, -1], dtype=np.int8), len(raw))),
                margin=Column(np.repeat(margin, 2)),
            )


def _prompt(value: Any, config: SourceConfig, number: int) -> str | Messages:
    """Text, or messages where the chat template is to be applied."""
    if isinstance(value, str):
        if not value:
            raise ValueError(f"row {number} has an empty prompt")
        if not config.chat and config.system is None:
            return value
        messages: Messages = [{"role": "user", "content": value}]
    elif (
        isinstance(value, list) and value and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    ):
        if config.chat is False:
            raise ValueError(f"row {number} has chat messages for a prompt, but chat is false; leave chat unset")
        messages = value
    else:
        raise ValueError(
            f"row {number}: a prompt is text or a list of messages with role and content, got {str(value)[:80]!r}"
        )
    system: Messages = [{"role": "system", "content": config.system}] if config.system is not None else []
    return [*system, *messages]


def _encode_prompts(prompts: Sequence[str | Messages], tokenizer: TextTokenizer) -> list[list[int]]:
    """Ids of each prompt; a rendered template brings its own special tokens."""
    chats = [not isinstance(prompt, str) for prompt in prompts]
    if any(chats) and not tokenizer.has_chat_template:
        raise ValueError(missing_template(tokenizer.folder))
    texts = [prompt if isinstance(prompt, str) else tokenizer.render(prompt) for prompt in prompts]
    encoded: list[list[int]] = [[] for _ in prompts]
    for chat in (False, True):
        which = [index for index, is_chat in enumerate(chats) if is_chat == chat]
        ids_of = tokenizer.encode([texts[index] for index in which], special_tokens=not chat)
        for index, ids in zip(which, ids_of, strict=True):
            encoded[index] = ids
    return encoded


def _response(value: Any, key: str) -> str:
    """A response is text, or a conversation whose last message it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[-1], dict) and isinstance(value[-1].get("content"), str):
        return str(value[-1]["content"])
    raise ValueError(f"{key!r} must be text or a list of messages, got {str(value)[:80]!r}")


def _readable(prompt: str | Messages) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return _text(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _text(value: Any) -> str:
    """Text as it is, nothing as "", anything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
