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
    head_size: int | None
    """Width of one attention head, where all heads have one width."""
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
    if weights:
        _check_weights(folder, key)
    text = settings["text_config"] if isinstance(settings.get("text_config"), dict) else settings
    heads = _number(text, "num_attention_heads", "n_head")
    labels = settings.get("id2label")
    return ModelShape(
        heads=heads,
        kv_heads=_number(text, "num_key_value_heads") or heads,
        head_size=_head_size(text, heads),
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


def _check_weights(folder: Path, key: str) -> None:
    """Raises ConfigError for a weight file that is missing from the index, cut short or no such file, by its header."""
    index = folder / "model.safetensors.index.json"
    try:
        listed = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{key}: {index} is not an index of weights ({error!r}); copy it again") from error
    missing = sorted(name for name in listed if not (folder / name).is_file())
    if missing:
        raise ConfigError(f"{key}: {folder / missing[0]} is missing, which {index.name} lists; copy it too")
    for file in sorted(folder.glob("*.safetensors")):
        wrong = _fault_of(file)
        if wrong:
            raise ConfigError(f"{key}: {file} {wrong}; copy it again")


def _fault_of(file: Path) -> str:
    """What is wrong with a safetensors file, from its header and size alone; empty where nothing is."""
    size = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(8)
        header = int.from_bytes(start, "little")
        if size < 8 or header > size - 8:
            pointer = b"git-lfs" in start + content.read(64)
            return (
                "is a Git LFS pointer, not weights"
                if pointer
                else f"is cut short or no safetensors file ({size} bytes)"
            )
        try:
            tensors = json.loads(content.read(header))
            end = max(
                (entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"), default=0
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "has no safetensors header"
    return "" if size == 8 + header + end else f"is damaged: it has {size} bytes and should have {8 + header + end}"


def _head_size(settings: dict[str, Any], heads: int | None) -> int | None:
    if "kv_lora_rank" in settings:
        return None  # Latent attention: keys, values and queries differ.
    hidden = _number(settings, "hidden_size", "n_embd")
    return _number(settings, "head_dim") or (hidden // heads if hidden and heads else None)


def _number(settings: dict[str, Any], *names: str) -> int | None:
    return next((settings[name] for name in names if isinstance(settings.get(name), int)), None)
