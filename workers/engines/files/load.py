"""Models from folders: modules without memory for their parameters, and what has the values, a slice at a time.

    init=pretrained    FolderWeights    (slices.py)          the folder's files
    init=random        RandomWeights    (random_start.py)    what the library starts its modules with

Where neither can be, the library loads the whole model on every rank, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlhf_dist.model_folder import HEAD, head_problem
from rlhf_dist.reshard.file_tensors import FileTensors
from rlhf_dist.reshard.layout import Layout
from rlhf_dist.reshard.shards import Shards
from workers.engines.files.file_tensors import UnknownFiles, file_tensors, kept_buffers, parameters_of
from workers.engines.files.random_start import RandomWeights
from workers.engines.files.slices import FolderWeights, ReadWhole, allocate, parameters_on_meta

Head = Literal["policy", "value"]


class Weights(Protocol):
    """Values of a model whose parameters have none yet."""

    def fill(self, layout: Layout, shards: Shards, rank: int) -> None:
        """Write this rank's boxes of every file tensor. layout: of file tensors; shards: its boxes, in that order."""

    def fill_whole(self, tensors: FileTensors, parameters: Mapping[str, Tensor]) -> None:
        """Write whole parameters; a part of the model is on its way at a time."""


def load(folder: Path, init: str, head: Head, seed: int, trained: bool) -> tuple[PreTrainedModel, Weights | None, str]:
    """The model in float32; what has its weights, or None where they are there, and why that is so."""
    if init not in ("pretrained", "random"):
        raise ValueError(f"model.init must be pretrained or random, got {init!r}")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    family: Any = AutoModelForCausalLM
    if head == "value":
        family = AutoModelForSequenceClassification
        if not any("SequenceClassification" in name for name in config.architectures or ()):
            config.num_labels = 1
    # Eager, as every family has it; a pass sets its own (`RoleModel.trunk`).
    made = {"config": config, "attn_implementation": "eager", "dtype": torch.float32}
    weights: Weights | None = None
    try:
        hf, tensors = _without_memory(family, made)
        if init == "random":
            weights = _random(family, made, tensors, seed, head)
        else:
            weights = _of_folder(folder, hf, tensors, head, trained)
        read_whole = ""
    except ReadWhole as reason:
        read_whole = str(reason)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hf = _whole(folder, family, made, init, head, trained)
    if head == "value" and not isinstance(getattr(hf, "score", None), nn.Linear):
        raise ValueError(f"{type(hf).__name__} has no linear `score` head; use a family that transformers gives one")
    assert isinstance(hf, PreTrainedModel)
    return hf, weights, read_whole


def fill_whole(hf: PreTrainedModel, weights: Weights, device: torch.device) -> None:
    """Have all values of a model that came without them, on `device`."""
    allocate(hf, device)
    hf.tie_weights()
    held = {name: tensor.detach() for name, tensor in (parameters_of(hf) | kept_buffers(hf)).items()}
    weights.fill_whole(file_tensors(hf, {name: tensor.shape for name, tensor in held.items()}), held)


def _without_memory(family: Any, made: Mapping[str, Any]) -> tuple[PreTrainedModel, FileTensors]:
    """The model on meta, and what its files hold. Raises ReadWhole, which says why not."""
    try:
        with parameters_on_meta():
            hf = family.from_config(**made, trust_remote_code=False)
        held = {name: tensor.shape for name, tensor in (parameters_of(hf) | kept_buffers(hf)).items()}
        return hf, file_tensors(hf, held)
    except (UnknownFiles, RuntimeError) as error:  # NotImplementedError is one, of an op that meta has not
        raise ReadWhole(f"it cannot be made without memory ({error})") from error


def _of_folder(folder: Path, hf: PreTrainedModel, tensors: FileTensors, head: Head, trained: bool) -> FolderWeights:
    weights = FolderWeights.open(folder, hf, tensors, frozenset({HEAD}) & tensors.shapes.keys())
    _check_head(folder, {*weights.unused, *weights.names.values()}, head, trained)
    return weights


def _random(family: Any, made: Mapping[str, Any], tensors: FileTensors, seed: int, head: Head) -> RandomWeights:
    with parameters_on_meta():
        own = family.from_config(**made, trust_remote_code=False)
    zeros = frozenset({HEAD} if head == "value" else ())
    weights = RandomWeights(own, frozenset(parameters_of(own)), tensors, seed, zeros)
    weights.check()
    return weights


def _whole(folder: Path, family: Any, made: Mapping[str, Any], init: str, head: Head, trained: bool) -> PreTrainedModel:
    """The whole model as the library loads or starts it; a value head that is in no file is zero."""
    new_head = head == "value"
    if init == "random":
        hf = family.from_config(**made, trust_remote_code=False)
    else:
        hf, info = family.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **made,
        )
        missing = set(info["missing_keys"]) - {HEAD}
        if missing:
            raise ValueError(f"the weights in {folder} lack {sorted(missing)[:5]}; is the folder complete?")
        new_head = new_head and HEAD in info["missing_keys"]
        _check_head(folder, {*info["unexpected_keys"], *(() if new_head else (HEAD,))}, head, trained)
    if new_head and isinstance(getattr(hf, "score", None), nn.Linear):
        nn.init.zeros_(hf.score.weight)
    return hf


def _check_head(folder: Path, held: set[str], head: Head, trained: bool) -> None:
    """Raise ValueError where the tensors `held` have a head of another kind, or lack one that is needed."""
    if head == "value" and (problem := head_problem(held, needed=not trained)):
        raise ValueError(f"{folder} {problem}")
