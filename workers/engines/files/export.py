"""Hugging Face folders out of a training engine or a checkpoint: what transformers, vLLM and peft load directly."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from transformers import AutoConfig

from rlhf_dist.data.ends import end_token_ids
from rlhf_dist.reshard.file_tensors import FileTensors, whole_box
from workers.engines.added.lora import Adapter, is_adapter
from workers.engines.added.own_heads import head_name, is_head, write_heads
from workers.engines.files.checkpoint import BrokenCheckpoint, ModelCard, copy_tokenizer, read_card

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
    config = deepcopy(config)  # The engine's own goes on as it was.
    config.architectures = [model]
    config.dtype = dtype
    config.save_pretrained(folder)
    copy_tokenizer(source, folder)
    if not model.endswith("ForSequenceClassification"):
        _write_generation_config(source, folder)


def _write_generation_config(source: Path, folder: Path) -> None:
    """The source's defaults of sampling, with every token that ends a response here: whoever serves it stops there."""
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {"_from_model_config": True}
    if ends := end_token_ids(source):
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    file.write_text(json.dumps(settings, indent=2) + "\n")


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
        "fan_in_fan_out": any(Adapter(*entry).transposed for entry in card.adapters.values()),
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
    pairs = {name for down, up, *_ in card.adapters.values() for name in (down, up)}
    if adapter:
        write_adapters(
            partial, {name: t.to(target) for name, t in _saved(checkpoint, card, sorted(pairs)).items()}, card
        )
    else:
        config = AutoConfig.from_pretrained(checkpoint / "hf", local_files_only=True, trust_remote_code=False)
        buckets = _buckets(checkpoint, card, target)
        write_model(partial, buckets, config, checkpoint / "hf", card.model, writes=True)
        heads = _saved(checkpoint, card, [name for name in card.shapes if is_head(name)])
        write_heads(partial, {head_name(name): weight for name, weight in heads.items()})
    partial.rename(folder)


def _buckets(checkpoint: Path, card: ModelCard, dtype: torch.dtype) -> Iterator[list[tuple[str, Tensor]]]:
    """The tensors of the model's files, at most FILE_BYTES in float32, or what is made of one parameter."""
    files = FileTensors.from_json(card.files, _of_model(card.shapes))
    bucket: tuple[list[str], list[str]] = ([], [])
    for parameters, names in files.groups:
        size = sum(prod(card.shapes[n]) for n in [*bucket[0], *parameters]) * 4
        if bucket[0] and size > FILE_BYTES:
            yield _tensors(checkpoint, card, files, *bucket, dtype)
            bucket = ([], [])
        bucket = (bucket[0] + parameters, bucket[1] + names)
    yield _tensors(checkpoint, card, files, *bucket, dtype)


def _of_model(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Those that belong to the model's own files."""
    return {name: shape for name, shape in shapes.items() if not is_adapter(name) and not is_head(name)}


def _tensors(
    checkpoint: Path, card: ModelCard, files: FileTensors, parameters: list[str], names: list[str], dtype: torch.dtype
) -> list[tuple[str, Tensor]]:
    """File tensors and the parameters they are made of, adapters merged where the model has them."""
    adapters = {name: Adapter(*card.adapters[name]) for name in parameters if name in card.adapters}
    parts = [part for adapter in adapters.values() for part in (adapter.down, adapter.up)]
    state = _saved(checkpoint, card, [*parameters, *parts])
    if frozen := [name for name in parameters if name not in state]:
        state |= {name: torch.empty(*card.shapes[name]) for name in frozen}
        for name in names:
            if any(part.parameter in frozen for part in files[name].parts):
                files.write(name, _base(card, name), state)
    for name, adapter in adapters.items():
        state[name] = state[name] + adapter.change(state[adapter.down], state[adapter.up], whole_box(card.shapes[name]))
    return [(name, files.read(name, state).to(dtype)) for name in names]


def _saved(checkpoint: Path, card: ModelCard, names: list[str]) -> dict[str, Tensor]:
    """Those of these parameters that the checkpoint holds, whole, float32."""
    reader = HuggingFaceStorageReader(str(checkpoint))
    saved = reader.read_metadata().state_dict_metadata
    sizes = {f"model.{name}": getattr(saved.get(f"model.{name}"), "size", None) for name in names}
    state = {key: torch.empty(size) for key, size in sizes.items() if size is not None}
    state_dict_loader.load(state, storage_reader=reader, no_dist=True)
    return {name: state[f"model.{name}"].view(*card.shapes[name]) for name in names if f"model.{name}" in state}


def _base(card: ModelCard, name: str) -> Tensor:
    """A weight that was not trained, from the folder training started from."""
    # Some folders were written from the model without its head, whose names lack the first word.
    names = [name, name.partition(".")[2]]
    for file in sorted(Path(card.source).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            if found := next((n for n in names if n in weights.keys()), None):
                base: Tensor = weights.get_tensor(found).float()
                return base
    raise BrokenCheckpoint(
        f"the checkpoint holds adapters only, and {card.source}, where training started, has no {name}; "
        "put the model folder back, or export with --adapter"
    )


def main() -> int:
    """`python -m workers.engines.files.export CHECKPOINT OUT`: what `rlhf-dist export` runs."""
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
