"""File tensors are what transformers saves, for every causal family; layouts and shards follow from parameters'."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlhf_dist.reshard.file_tensors import FileTensors
from rlhf_dist.reshard.layout import Layout, ParameterLayout
from rlhf_dist.reshard.shards import flat_shards
from tests.families import families, tiny_config, tiny_model
from tests.tiny import llama_config
from workers.engines.files.file_tensors import UnknownFiles, file_tensors, kept_buffers

CUT = ("mixtral", "qwen3_moe", "olmo_hybrid", "nemotron_h", "gpt_neox", "glm4_moe")
"""Split over experts, joined, renamed, with a buffer."""


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()} | kept_buffers(model)


def _files(model: PreTrainedModel) -> FileTensors:
    return file_tensors(model, {name: tensor.shape for name, tensor in _weights(model).items()})


def test_every_familys_files_can_be_learned() -> None:
    tried, unknown = 0, []
    for family in families():
        try:
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                model = AutoModelForCausalLM.from_config(tiny_config(family))
        except Exception:  # noqa: BLE001 - no tiny model of it: there is nothing to learn
            continue
        try:
            _files(model)  # every element of every weight is in one file tensor, or it raises
            tried += 1
        except UnknownFiles:
            unknown.append(family)
    assert tried >= 110
    assert unknown == ["deepseek_v4"]  # it keeps a table of whole numbers in its files


@pytest.mark.parametrize("family", CUT)
def test_files_are_what_transformers_saves(family: str) -> None:
    model = tiny_model(tiny_config(family))
    files, weights = _files(model), _weights(model)
    saved = revert_weight_conversion(model, dict(weights))
    assert files.keys() == saved.keys()
    for name in files:
        assert torch.equal(files.read(name, weights), saved[name]), name


@pytest.mark.parametrize("family", CUT)
@pytest.mark.parametrize("cut", ["rows", "flat"])
def test_shards_of_files_are_views_of_shards_of_parameters(family: str, cut: str) -> None:
    model = tiny_model(tiny_config(family))
    weights, files, world = _weights(model), _files(model), 3
    layouts, shards = {}, [{} for _ in range(world)]
    for name, weight in weights.items():
        if cut == "rows":
            layouts[name] = ParameterLayout.from_mesh(tuple(weight.shape), "float32", np.arange(world), [0])
            for rank in range(world):
                boxes = layouts[name].boxes_of(rank)
                shards[rank][name] = [weight[tuple(slice(*edges) for edges in box)] for box in boxes]
        else:
            edges = np.linspace(0, weight.numel(), world + 1).astype(int).tolist()
            ranges = [(rank, edges[rank], edges[rank + 1]) for rank in range(world)]
            layouts[name] = ParameterLayout.from_flat_ranges(tuple(weight.shape), "float32", ranges)
            for rank, begin, end in ranges:
                flat = weight.reshape(-1)[begin:end]
                shards[rank][name] = flat_shards(flat, weight.shape, begin, end)
    held = Layout(world, layouts)
    layout, cuts = files.layout(held).check(), [files.cuts(held, rank) for rank in range(world)]
    for name, tensor in files.items():
        whole = torch.full(tensor.shape, torch.nan)
        for rank in range(world):
            parts = files.shards(cuts[rank], shards[rank])[name]
            for box, part in zip(layout.parameters[name].boxes_of(rank), parts, strict=True):
                whole[tuple(slice(*edges) for edges in box)] = part
        assert torch.equal(whole, files.read(name, weights)), name


def test_whole_file_tensors_are_written_back_where_they_came_from() -> None:
    model = tiny_model(tiny_config("mixtral"))
    weights, files = _weights(model), _files(model)
    back = {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}
    for name in files:
        files.write(name, files.read(name, weights), back)
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    again = FileTensors.from_json(files.as_json(), {name: tuple(w.shape) for name, w in weights.items()})
    assert dict(again) == dict(files)


def test_groups_are_what_one_conversion_needs() -> None:
    model = tiny_model(tiny_config("mixtral"))
    files = _files(model)
    groups = {parameters[0]: names for parameters, names in files.groups if len(parameters) == 1}
    assert len(groups) == len(_weights(model))
    experts = groups["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts[0] == "model.layers.0.block_sparse_moe.experts.0.w1.weight" and len(experts) == 8


def test_what_computes_something_new_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM(llama_config())
    monkeypatch.setattr(
        "workers.engines.files.file_tensors.revert_weight_conversion",
        lambda _, weights: {name: tensor * 2 for name, tensor in weights.items()},
    )
    with pytest.raises(
        UnknownFiles, match="LlamaForCausalLM: how its files hold its weights .*a tensor is computed anew"
    ):
        _files(model)
