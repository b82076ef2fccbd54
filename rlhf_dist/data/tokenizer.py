"""A tokenizer from a Hugging Face model folder, without torch: tokenizer.json and the chat template as they are.

Gives the ids that transformers' AutoTokenizer gives (a test compares them); importing that one takes
seconds and brings torch along, which neither the driver nor a source needs.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Messages = list[dict[str, Any]]


class TextTokenizer:
    """Text and chat messages to token ids. Raises ValueError naming the file that is missing or cannot be read."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        settings = _read_settings(self.folder)
        special = {
            name: _token_text(settings.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        self._special = {name: text for name, text in special.items() if text}
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

    def render(self, messages: Messages) -> str:
        """The messages under the chat template, up to where the assistant's answer begins.

        Raises ValueError if there is no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise ValueError(missing_template(self.folder))
        import jinja2

        try:
            text: str = (
                _environment()
                .from_string(self._template)
                .render(messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._special)
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {self.folder} refuses {messages}: {error}") from error
        return text


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
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        settings: dict[str, Any] = json.loads(file.read_text())
    except json.JSONDecodeError as error:
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
    return Tokenizer.from_file(str(file))


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in template}
        return str(named["default"]) if "default" in named else None
    return None if template is None else str(template)


def _token_text(token: Any) -> str | None:
    """A special token is written as its text, or as a dict with `content`."""
    text: str | None = token["content"] if isinstance(token, dict) else token
    return text


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates: sandboxed, with the same few extras."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
