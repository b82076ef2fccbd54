"""What a Hugging Face model folder says about itself, read without loading anything."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_dist.quantised import quantised
from rlhf_dist.typed import ConfigError

PREPARED_BY = {"models/smollm2": "make smollm2", "runs/demo/model": "make demo"}
"""Folders that are made, not downloaded, and the command that makes them."""

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")

HEAD = "score.weight"
"""The one tensor of a value head, [1, hidden], as transformers' sequence classifiers have it."""
_HEADS = ("score.", "v_head.", "value_head.", "classifier.", "reward_head.", "regression_head.", "rm_head.")
"""How heads of reward and value models begin, here and elsewhere."""


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
    made_by = PREPARED_BY.get(folder.as_posix())
    hint = (
        f"run `{made_by}` to make it"
        if made_by
        else "give a Hugging Face model folder, or choose model=demo or model=smollm2"
    )
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
    if how := quantised(folder, settings):
        raise ConfigError(f"{key}: {path!r} {how}")
    if weights:
        _check_weights(folder, path, key, hint, settings)
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


def check_head(path: str, key: str, *, needed: bool) -> None:
    """Raises ConfigError if the model at `path` has another value head than ours, or `needed` and none at all."""
    if problem := head_problem(weight_names(Path(path).expanduser()), needed=needed):
        raise ConfigError(f"{key}: {path!r} {problem}")


def head_problem(names: Iterable[str], *, needed: bool) -> str | None:
    """What is wrong with the value head among the weights `names`, said of their folder; None if nothing is."""
    found = sorted(name for name in names if name.startswith(_HEADS))
    if found and found != [HEAD]:
        return (
            f"has {', '.join(found)}, and a value head here is {HEAD} alone, without a bias; save it as a sequence "
            "classifier of transformers with one label"
        )
    if needed and not found:
        return (
            f"has no {HEAD}: it is no reward model, and every reward would be 0; give a sequence classifier of "
            "transformers with one label (rlhf-dist run reward_model trains one)"
        )
    return None


def weight_names(folder: Path) -> set[str]:
    """The tensors of a folder's safetensors files, from their headers. Raises ConfigError for a file that is cut."""
    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            try:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            except (json.JSONDecodeError, UnicodeDecodeError, OverflowError, MemoryError) as error:
                raise ConfigError(f"{file} is no safetensors file, or is cut; copy it again") from error
        names |= header.keys() - {"__metadata__"}
    return names


def _check_weights(folder: Path, path: str, key: str, hint: str, settings: dict[str, Any]) -> None:
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        init = key.replace(".path", ".init")
        raise ConfigError(f"{key}: {path!r} has no weights (*.safetensors); {hint}, or set {init}=random")
    if not any(folder.glob("*.safetensors")):
        kind = next(iter(settings.get("architectures") or ()), "AutoModelForCausalLM")
        raise ConfigError(
            f"{key}: {path!r} has pytorch_model.bin only, a pickle, which is not read; convert it once: python -c "
            f"\"from transformers import {kind} as M; M.from_pretrained('{path}').save_pretrained('NEW')\", and copy "
            "the tokenizer's files to NEW"
        )
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
