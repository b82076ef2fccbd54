"""A training engine on disk: sharded checkpoints to resume from, and Hugging Face folders to use elsewhere.

Both are safetensors files. Sharded ones go through torch.distributed.checkpoint, each rank writing its rows
with their offsets, so that any number of ranks can read them; nothing is pickled, so nothing in a folder
somebody else made can run code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from transformers import PreTrainedModel

EXPORT_FILE_BYTES = 2 << 30
"""Most bytes of one exported weight file (a larger tensor gets a file of its own)."""

_ALONGSIDE = (
    *("tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "generation_config.json"),
)


def save(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    version: int,
    group: dist.ProcessGroup,
) -> None:
    """Write every rank's shards to `folder`, which all ranks share. Collective.

    Raises FileExistsError if it holds a checkpoint already: shards of two would be read as one.
    """
    stale = [any(folder.glob("*.safetensors"))]
    dist.broadcast_object_list(stale, group=group, group_src=0)
    if stale[0]:
        raise FileExistsError(f"{folder} holds a checkpoint already; save to a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    state = _state(parameters, optimizer, version)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    state_dict_saver.save(state, storage_writer=writer, process_group=group)


def load(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    group: dist.ProcessGroup,
) -> int:
    """Restore in place what `save` wrote, on any number of ranks; returns the version. Collective.

    Raises FileNotFoundError if there is no checkpoint, and what torch raises if it is of another model.
    """
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"no checkpoint in {folder}")
    state = _state(parameters, optimizer, 0)
    state_dict_loader.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=group)
    version = int(state["version"])
    for kept in optimizer.state.values() if optimizer else ():
        kept["step"].fill_(float(version))
    return version


def export(
    folder: Path,
    model: PreTrainedModel,
    buckets: Iterable[list[tuple[str, Tensor]]],
    source: Path,
    group: dist.ProcessGroup,
) -> None:
    """Write `buckets` of full weights, the model's config and the tokenizer found in `source`. Collective.

    Rank 0 writes; all ranks return when the folder is complete.
    """
    writes = dist.get_rank(group) == 0
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
    if writes:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        model.config.architectures = [type(model).__name__]
        model.config.dtype = dtype
        model.config.save_pretrained(folder)
        for pattern in _ALONGSIDE:
            for file in source.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    dist.barrier(group=group)


def _state(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None, version: int
) -> dict[str, Tensor]:
    """One flat dict of tensors: weights, Adam's moments, and the version, which every Adam step count equals."""
    state: dict[str, Tensor] = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    if optimizer is not None:
        for name, parameter in parameters.items():
            kept = optimizer.state[parameter]
            if not kept:
                kept["step"] = torch.tensor(float(version))
                kept["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                kept["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state[f"exp_avg.{name}"] = kept["exp_avg"]
            state[f"exp_avg_sq.{name}"] = kept["exp_avg_sq"]
    state["version"] = torch.tensor([version], dtype=torch.int64)
    return state
