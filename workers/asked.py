"""Prompts made of rows: a template filled in, in the chat template and tokenizer of the role that is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_dist.batch import Batch
from rlhf_dist.data.encode import encode_texts
from rlhf_dist.data.tokenizer import TextTokenizer
from rlhf_dist.prompt_template import Template
from rlhf_dist.wire import WorkerContext


@dataclass(frozen=True, eq=False)
class Asked:
    """What a role is asked about each row."""

    prompts: list[NDArray[np.int32]]
    """Token ids; the response follows them."""
    texts: list[str] | None = None
    """What the user says, without the chat template; None: the batch's own prompts."""
    answers: list[str] | None = None
    """How each answer begins, as a part of the prompt."""


class Asker:
    """Makes the prompts of one role."""

    def __init__(self, folder: str, context: WorkerContext) -> None:
        """folder: of the role's model."""
        self._folder, self._context = folder, context
        self._decoders: dict[str, Any] = {}

    @cached_property
    def _plain(self) -> TextTokenizer:
        return TextTokenizer(self._folder)

    def ask(self, batch: Batch, template: Template | None, decode: Mapping[str, str], prefix: str | None) -> Asked:
        """The prompts of a batch. decode: token column of the template -> whose tokenizer made it. prefix: a column of
        text or token ids that stands behind each prompt. Raises ValueError naming the row for what cannot be written.
        """
        if template is None:
            asked = Asked([batch["prompt_ids"].row(row) for row in range(batch.num_rows)])
        else:
            asked = self._filled(batch, template, decode)
        if prefix is None:
            return asked
        begun = self._tokens(batch, prefix)
        prompts = [np.concatenate([prompt, own]) for prompt, own in zip(asked.prompts, begun, strict=True)]
        return Asked(prompts, asked.texts, asked.answers)

    def _filled(self, batch: Batch, template: Template, decode: Mapping[str, str]) -> Asked:
        tokenizer = TextTokenizer(self._folder, template.template_args) if template.template_args else self._plain
        chat = tokenizer.has_chat_template if template.chat is None else template.chat
        columns = {name: self._values(batch, name, decode.get(name)) for name in template.columns}
        texts, answers, whole = list[str](), list[str](), list[str]()
        for row in range(batch.num_rows):
            try:
                messages, answer = template.messages({name: values[row] for name, values in columns.items()})
                rendered = tokenizer.render(messages) if chat else "\n\n".join(one["content"] for one in messages)
            except ValueError as error:
                raise ValueError(f"row {row}: {error}") from error
            texts.append(messages[-1]["content"])
            answers.append(answer)
            whole.append(rendered + answer)
        ids = encode_texts(whole, [chat] * len(whole), tokenizer)
        return Asked([np.asarray(one, dtype=np.int32) for one in ids], texts, answers)

    def _values(self, batch: Batch, name: str, maker: str | None) -> list[Any]:
        rows = batch[name].rows()
        if maker is None:
            return rows
        if maker not in self._decoders:
            from transformers import AutoTokenizer

            self._decoders[maker] = AutoTokenizer.from_pretrained(
                self._context.tokenizers[maker], trust_remote_code=False
            )
        return [self._decoders[maker].decode(ids, skip_special_tokens=True) for ids in rows]

    def _tokens(self, batch: Batch, name: str) -> list[NDArray[np.int32]]:
        column = batch[name]
        if column.text:
            ids = self._plain.encode(column.rows(), special_tokens=False)
            return [np.asarray(one, dtype=np.int32) for one in ids]
        if column.offsets is None or not np.issubdtype(column.values.dtype, np.integer):
            raise ValueError(f"prefix={name!r} must be a column of text or token ids, got {column.values.dtype}")
        return [ids.astype(np.int32) for ids in column.rows()]
