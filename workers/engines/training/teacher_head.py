"""The head of another role's model, read from its folder: what distributions beside a model's own are made with.

A teacher's last states travel as a column (4 H bytes a token; distributions: 4 V), and every rank of the student
has its head, [V, H] in the engine's dtype. Only of frozen teachers the files say what they are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from workers.engines.files.file_tensors import file_tensors, kept_buffers, parameters_of
from workers.engines.files.slices import FolderWeights, parameters_on_meta
from workers.engines.model.heads import library_logits, matrix_head
from workers.engines.model.log_probs import Head, capped, head_logits
from workers.engines.model.token_split import WHOLE

_LARGE = 50.0
"""Size of the states that a head is tried with: caps on logits show there."""


def teacher_head(folder: Path, dtype: torch.dtype, device: torch.device) -> Head:
    """The language-model head of `folder`. Raises ValueError where it is not one matrix, or not read in slices."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with parameters_on_meta():
        hf: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    held = {name: tensor.shape for name, tensor in (parameters_of(hf) | kept_buffers(hf)).items()}
    tensors = file_tensors(hf, held)
    weights = FolderWeights.open(folder, hf, tensors)
    layer = hf.get_output_embeddings()
    files = {parameter: file for file, parameter in tensors.same.items()}
    names = {id(parameter): name for name, parameter in parameters_of(hf).items()}
    for key, empty in list(layer.named_parameters(recurse=False)) if layer is not None else ():
        file = files.get(names.get(id(empty), ""))
        if file is None:
            raise ValueError(f"{folder}: its head is in several tensors; distil its top_k instead")
        setattr(layer, key, nn.Parameter(weights.whole(file).to(dtype), requires_grad=False))
    head = matrix_head(hf, WHOLE)
    if head is None or not _is_all(hf, head):
        raise ValueError(f"the head of {type(hf).__name__} in {folder} is not one matrix; distil its top_k instead")
    bias = None if head.bias is None else head.bias.detach().to(device)
    return replace(head, weight=head.weight.detach().to(device), bias=bias)


def _is_all(hf: PreTrainedModel, head: Head) -> bool:
    """Whether the library's own code after the trunk says what the matrix says."""
    hidden = torch.randn(2, head.weight.shape[1], generator=torch.Generator().manual_seed(0)) * _LARGE
    hidden = hidden.to(head.weight.dtype)
    with torch.no_grad():
        ours = capped(head_logits(hidden, head.weight, head.bias, head.scale), head.softcap)
        try:
            theirs: Tensor = library_logits(hf, BaseModelOutputWithPast(), hidden).float()
            return bool((theirs - ours).abs().max() <= 1e-2 * ours.abs().max())
        except Exception:  # noqa: BLE001 - whatever the library makes of weights that are not there
            return False
