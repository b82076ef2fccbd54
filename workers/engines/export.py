"""Hugging Face folders out of a training engine or a checkpoint: what transformers, vLLM and peft load directly."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from transformers import AutoConfig

from workers.engines.checkpoint import BrokenCheckpoint, ModelCard, copy_tokenizer, read_card

FILE_BYTES = 2 << 30
"""Most bytes of one exported weight file (a larger tensor gets a file of its own)."""

Buckets = Iterable[list[tuple[str, Tensor]]]


def write_model(folder: Path, buckets: Buckets, config: Any, source: Path, model: str, *, writes: bool) -> None:
    """Write `buckets` of whole weights, `config` for class `model`, and the tokenizer found in `source`.

    `writes` False only exhausts the buckets, whose making may be collective.
    """
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    dtype, total = torch.float32, 0
    for number, bucket in enumerate(buckets, start=1):
        name = f"model-{number:05d}.safetensors"
        if writes:
            save_file({key: tensor.cpu().contiguous() for key, tensor in bucket}, folder / name, {"format": "pt"})
        files |= {key: name for key, _ in bucket}
        dtype, total = bucket[0][1].dtype, total + sum(tensor.nbytes for _, tensor in bucket)
    if not writes:
        return
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config.architectures = [model]
    config.dtype = dtype
    config.save_pretrained(folder)
    copy_tokenizer(source, folder)


def write_adapters(folder: Path, adapters: Mapping[str, Tensor], card: ModelCard) -> None:
    """Write adapters alone, as peft and vLLM load them. Raises ValueError for a model without any."""
    if not adapters:
        raise ValueError("this model has no adapters (it was trained whole); export it without --adapter")
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"base_model.model.{name}": tensor.cpu().contiguous() for name, tensor in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({name.rsplit(".", 3)[-3] for name in adapters})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if card.model.endswith("CausalLM") else "SEQ_CLS",
        "base_model_name_or_path": card.source,
        "r": card.lora["rank"],
        "lora_alpha": card.lora["alpha"],
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))


def export_checkpoint(checkpoint: Path, folder: Path, *, dtype: str | None, adapter: bool) -> None:
    """A role's checkpoint folder as a Hugging Face folder, in this process alone, at most FILE_BYTES at a time.

    dtype: `float32` or `bfloat16`; None for what `model.json` says. `adapter`: the adapters alone; otherwise
    they are merged into the weights of the folder training started from. Raises FileNotFoundError or
    BrokenCheckpoint for what is no complete checkpoint, FileExistsError if `folder` is there already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; choose another folder, or remove it")
    card = read_card(checkpoint)
    target = getattr(torch, dtype or card.dtype)
    partial = folder.with_name(f".{folder.name}.partial")
    pairs = {name for down, up, _ in card.adapters.values() for name in (down, up)}
    if adapter:
        write_adapters(partial, {name: t.to(target) for name, t in _read(checkpoint, card, sorted(pairs))}, card)
    else:
        config = AutoConfig.from_pretrained(checkpoint / "hf", local_files_only=True)
        names = [name for name in card.shapes if name not in pairs]
        buckets = _buckets(checkpoint, card, names, target)
        write_model(partial, buckets, config, checkpoint / "hf", card.model, writes=True)
    partial.rename(folder)


def _buckets(
    checkpoint: Path, card: ModelCard, names: list[str], dtype: torch.dtype
) -> Iterator[list[tuple[str, Tensor]]]:
    bucket: list[str] = []
    for name in names:
        size = sum(torch.Size(card.shapes[n]).numel() for n in [*bucket, name]) * 4
        if bucket and size > FILE_BYTES:
            yield [(n, t.to(dtype)) for n, t in _read(checkpoint, card, bucket)]
            bucket = []
        bucket.append(name)
    yield [(n, t.to(dtype)) for n, t in _read(checkpoint, card, bucket)]


def _read(checkpoint: Path, card: ModelCard, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Whole float32 parameters, adapters merged where the model has them."""
    reader = HuggingFaceStorageReader(str(checkpoint))
    saved = reader.read_metadata().state_dict_metadata
    wanted = {part for name in names for part in (name, *card.adapters.get(name, ())[:2])}
    flat = {f"model.{name}": getattr(saved.get(f"model.{name}"), "size", None) for name in wanted}
    state = {key: torch.empty(size) for key, size in flat.items() if size is not None}
    state_dict_loader.load(state, storage_reader=reader, no_dist=True)
    for name in names:
        whole = state[f"model.{name}"].view(*card.shapes[name]) if f"model.{name}" in state else _base(card, name)
        if name in card.adapters:
            down, up, scale = card.adapters[name]
            change = state[f"model.{up}"].view(*card.shapes[up]) @ state[f"model.{down}"].view(*card.shapes[down])
            whole = torch.add(whole, change, alpha=float(scale))
        yield name, whole


def _base(card: ModelCard, name: str) -> Tensor:
    """A weight that was not trained, from the folder training started from."""
    for file in sorted(Path(card.source).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            if name in weights.keys():
                return weights.get_tensor(name).float()
    raise BrokenCheckpoint(
        f"the checkpoint holds adapters only, and {card.source}, where training started, has no {name}; "
        "put the model folder back, or export with --adapter"
    )


def main() -> int:
    """`python -m workers.engines.export CHECKPOINT OUT`: what `rlhf-dist export` runs."""
    parser = argparse.ArgumentParser(description=export_checkpoint.__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--adapter", action="store_true")
    given = parser.parse_args()
    export_checkpoint(given.checkpoint, given.out, dtype=given.dtype, adapter=given.adapter)
    return 0


if __name__ == "__main__":
    sys.exit(main())
