"""Prompts made of rows, and responses of texts: in the chat template and tokenizer of the role that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import RolloutConfig
from rlhf_dist.data.encode import encode_texts
from rlhf_dist.data.ends import ends_of
from rlhf_dist.data.tokenizer import TextTokenizer
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.prompt_template import Template
from rlhf_dist.wire import OpResult, WorkerContext


@dataclass(frozen=True, eq=False)
class Asked:
    """What a role is asked about each row."""

    prompts: list[NDArray[np.int32]]
    """Token ids; the response follows them."""
    texts: list[str] | None = None
    """What the user says, without the chat template; None: the batch's own prompts."""
    answers: list[str] | None = None
    """How each answer begins, as a part of the prompt."""


def check_fits(asked: Asked, limit: int, key: str) -> None:
    """Raises ValueError naming the first prompt of a template that has more than `limit` tokens, which `key` says."""
    lengths = np.array([len(prompt) for prompt in asked.prompts], dtype=np.int64)
    if (lengths > limit).any():
        row = int(np.flatnonzero(lengths > limit)[0])
        raise ValueError(
            f"the template makes a prompt of {lengths[row]} tokens of row {row}, and {key} is {limit}; set {key}="
            f"{lengths.max()} or shorten what it writes"
        )


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

    def spoken(self, texts: list[str], limit: int) -> tuple[list[NDArray[np.int32]], NDArray[np.uint8]]:
        """Tokens of these texts as responses, each with an end of text, and whether it fits into `limit` tokens with
        it; one that does not is cut there. Raises ValueError where the model's folder names no end."""
        end = ends_of(self._folder, self._plain).appended
        if end is None:
            raise ValueError(f"nothing in {self._folder} names an end of text (eos_token, eos_token_id) for a response")
        whole = [np.array([*ids, end], dtype=np.int32) for ids in self._plain.encode(texts, special_tokens=False)]
        fits = np.array([len(ids) <= limit for ids in whole], dtype=np.uint8)
        return [ids[:limit] for ids in whole], fits

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


def encode_rows(
    asker: Asker,
    rollout: RolloutConfig,
    batch: Batch,
    *,
    template: Template,
    decode: Mapping[str, str],
    response: str | None,
    key: str,
) -> OpResult:
    """`LanguageModel.encode`: the columns of other prompts, and of other responses where `response` names a text.

    decode: as in `Asker.ask`. key: of the settings of `rollout`. Raises ValueError for a prompt that is too long.
    """
    asked = asker.ask(batch, template, decode, None)
    check_fits(asked, rollout.max_prompt_tokens, f"{key}.max_prompt_tokens")
    assert asked.texts is not None, "a template says what it wrote"
    columns = {"prompt_ids": Column.ragged(asked.prompts, dtype=np.int32), "prompt": Column.strings(asked.texts)}
    metrics: Metrics = {}
    if response is not None:
        if not batch[response].text:
            raise ValueError(f"response={response!r} must be a column of text, got {batch[response].values.dtype}")
        texts = batch[response].rows()
        spoken, fits = asker.spoken(texts, rollout.max_response_tokens)
        ids = Column.ragged(spoken, dtype=np.int32)
        columns |= {
            "response_ids": ids,
            "response_mask": Column(np.ones(len(ids.values), dtype=np.uint8), ids.offsets),
            "response": Column.strings(texts),
            "finished": Column(fits),
        }
        metrics = {"responses_cut": Mean(float((1 - fits).sum()), 0)}
    return OpResult(columns=Batch(columns, batch.num_rows), metrics=metrics)
