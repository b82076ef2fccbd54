"""A tokenizer from a Hugging Face model folder, without torch: tokenizer.json and the chat template as they are.

Gives the ids that transformers' AutoTokenizer gives (a test compares them); importing that one takes
seconds and brings torch along, which neither the driver nor a source needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_dist.data.messages import Messages
from rlhf_dist.data.template import Span, render

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Tokens that a chat template may name."""


class TextTokenizer:
    """Text and chat messages to token ids. Raises ValueError naming the file that is missing or cannot be read."""

    def __init__(self, folder: str | Path, template_args: Mapping[str, Any] | None = None) -> None:
        """`template_args`: arguments of the chat template beside the messages."""
        self.folder = Path(folder)
        settings = _read_settings(self.folder)
        special = {name: _token_text(settings.get(name)) for name in SPECIAL}
        self._arguments: dict[str, Any] = {name: text for name, text in special.items() if text}
        self._arguments |= dict(template_args or {})
        self._template = _chat_template(self.folder, settings)
        self._tokenizer = _load(self.folder)
        self.eos_id: int | None = None
        """Id of the end-of-sequence token; None if the tokenizer names none."""
        if special["eos_token"]:
            self.eos_id = self._tokenizer.token_to_id(special["eos_token"])

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be rendered."""
        return self._template is not None

    def encode(self, texts: Sequence[str], *, special_tokens: bool) -> list[list[int]]:
        """Token ids of each text, with the tokenizer's own begin/end tokens if `special_tokens`."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
        return [encoding.ids for encoding in encoded]

    def places(self, text: str, *, special_tokens: bool) -> list[Span]:
        """For each token of `encode([text])` the characters it stands for."""
        return list(self._tokenizer.encode(text, add_special_tokens=special_tokens).offsets)

    def decode(self, ids: Sequence[int], *, special_tokens: bool = True) -> str:
        """The text of these tokens, with special ones or without."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=not special_tokens)
        return text

    def token(self, token_id: int) -> str:
        """How the vocabulary writes a token."""
        return str(self._tokenizer.id_to_token(token_id))

    def is_special(self, token_id: int) -> bool:
        """Whether the token stands for no text."""
        added = self._tokenizer.get_added_tokens_decoder().get(token_id)
        return added is not None and bool(added.special)

    def render(self, messages: Messages, *, generation_prompt: bool = True, tools: Any = None) -> str:
        """The messages under the chat template, up to where the assistant's answer begins if `generation_prompt`.

        Raises ValueError if there is no chat template, or the template refuses the messages.
        """
        return self.render_spans(messages, generation_prompt=generation_prompt, tools=tools)[0]

    def render_spans(
        self, messages: Messages, *, generation_prompt: bool = False, tools: Any = None
    ) -> tuple[str, list[Span]]:
        """As `render`, and the characters inside the template's `generation` blocks; none where it has none."""
        if self._template is None:
            raise ValueError(missing_template(self.folder))
        try:
            return render(self._template, messages, generation_prompt=generation_prompt, tools=tools, **self._arguments)
        except Exception as error:  # a template may raise anything on messages it was not written for
            raise ValueError(
                f"the chat template of {self.folder} refuses {_short(messages)}: {type(error).__name__}: {error}"
            ) from error


def has_chat_template(folder: str | Path) -> bool:
    """Whether the folder has a chat template, from its JSON alone (milliseconds)."""
    return _chat_template(Path(folder), _read_settings(Path(folder))) is not None


def missing_template(folder: str | Path) -> str:
    """What to say where chat data meets a tokenizer without a template."""
    return (
        f"the tokenizer in {folder} has no chat template, which chat messages (and `system`, `chat: true`) need; "
        "add a chat_template.jinja to that folder, or use plain text prompts"
    )


def _read_settings(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"no tokenizer folder {str(folder)!r} (looked for {folder.resolve()})")
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second is the newer form
        file = folder / name
        if file.is_file():
            try:
                settings |= json.loads(file.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
                raise ValueError(f"{file} is not JSON: {error}") from error
    return settings


def _load(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"no tokenizer.json in {folder}; save it with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder), which converts older formats"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{file} cannot be read: {error}") from error
    # Left in the file by whoever saved it; transformers applies neither unless it is asked to.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in template}
        return str(named["default"]) if "default" in named else None
    return None if template is None else str(template)


def _token_text(token: Any) -> str | None:
    """A special token is written as its text, or as a dict with `content`."""
    text: str | None = token["content"] if isinstance(token, dict) else token
    return text


def _short(messages: Messages) -> str:
    text = str(messages)
    return text if len(text) <= 200 else f"{text[:200]}..."
