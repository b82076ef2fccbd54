"""What a Hugging Face model folder says about itself, read without loading anything."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_dist.typed import ConfigError

PREPARED_BY = {"models/smollm2": "make smollm2", "runs/demo/model": "make demo"}
"""Folders that are made, not downloaded, and the command that makes them."""

HUB_ID = r"(?!models/|runs/)[A-Za-z0-9][\w.-]*/[\w.-]+"
"""What `organisation/name` looks like."""

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers of config.json that a launch depends on; None where the model does not say."""

    heads: int | None
    kv_heads: int | None
    max_tokens: int | None
    """Longest sequence, tokens."""
    vocabulary: int | None
    labels: int
    """Outputs of a sequence-classification head."""


def read_shape(path: str, key: str, *, weights: bool = True) -> ModelShape:
    """The shape of the model at `path`, which the setting `key` names.

    Raises ConfigError if the folder, its config.json, or (with `weights`) its weights are missing.
    """
    folder = Path(path)
    how = PREPARED_BY.get(folder.as_posix())
    hint = (
        f"run `{how}` to make it" if how else "give a Hugging Face model folder, or choose model=demo or model=smollm2"
    )
    if re.fullmatch(HUB_ID, path) and not folder.parent.is_dir():
        hint = no_download(path, key)
    if not folder.is_dir():
        raise ConfigError(f"{key}: no folder {path!r} (looked for {folder.resolve()}); {hint}")
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{key}: {path!r} is no model folder, it has no config.json; {hint}")
    try:
        settings = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {file} is not JSON ({error}); {hint}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{key}: {file} must hold a JSON object; {hint}")
    if weights and not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        init = key.replace(".path", ".init")
        raise ConfigError(f"{key}: {path!r} has no weights (*.safetensors); {hint}, or set {init}=random")
    text = settings["text_config"] if isinstance(settings.get("text_config"), dict) else settings
    heads = _number(text, "num_attention_heads", "n_head")
    labels = settings.get("id2label")
    return ModelShape(
        heads=heads,
        kv_heads=_number(text, "num_key_value_heads") or heads,
        max_tokens=_number(text, "max_position_embeddings", "n_positions"),
        vocabulary=_number(text, "vocab_size"),
        labels=len(labels) if isinstance(labels, dict) else int(settings.get("num_labels", 2)),
    )


def no_download(hub_id: str, key: str = "model.path") -> str:
    """What to do with a model that is named as on a hub."""
    folder = f"models/{hub_id.rpartition('/')[2]}"
    return (
        f"nothing is downloaded here: fetch {hub_id} first, with `hf download {hub_id} --local-dir {folder}`, and set "
        f"{key}={folder}"
    )


def _number(settings: dict[str, Any], *names: str) -> int | None:
    return next((settings[name] for name in names if isinstance(settings.get(name), int)), None)
