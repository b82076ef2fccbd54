"""Models are read by slices: a rank holds its shards and one slice on the way, and has the values of the files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_dist.config import LoraConfig
from tests.engines.loading import WIDE, Peak, peak_of_building
from tests.engines.test_exact import new_engine
from tests.engines.world import World
from tests.families import tiny_config, tiny_model

ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "tensor parallel": {"tensor_parallel": 2},
    "replicas": {"replicas": 2},
    "zero 1": {"name": "deepspeed", "zero_stage": 1},
    "zero 3": {"name": "deepspeed", "zero_stage": 3},
}


@pytest.fixture(scope="module")
def world2() -> Iterator[World]:
    world = World(2)
    yield world
    world.close()


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tied, with Conv1D, with experts that the files hold one by one, and in bfloat16 over several files."""
    root = tmp_path_factory.mktemp("families")
    for name in ("llama", "gpt2", "mixtral"):
        model = tiny_model(tiny_config(name))
        if name == "llama":
            model = model.to(torch.bfloat16)
        model.save_pretrained(root / name, max_shard_size="40KB")
    return {folder.name: folder for folder in root.iterdir()}


def loaded(folder: Path, trained: bool, engine: dict[str, Any]) -> tuple[bool, int, dict[str, np.ndarray]]:
    """Whether it was read by slices, boxes of this rank that are those of the files, and all of the weights."""
    made = new_engine(folder, trained=trained, **engine)
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    boxes = 0
    for name, shards in made.local_shards().items():
        parameter = made.layout().parameters[name]
        for box, shard in zip(np.flatnonzero(parameter.rank == dist.get_rank()), shards, strict=True):
            held = stored[name][tuple(slice(*edges) for edges in parameter.box(int(box)))]
            assert torch.equal(shard.float(), held.float()), (name, parameter.box(int(box)))
            boxes += 1
    weights = {name: w.numpy().copy() for bucket in made.full_weights(torch.float32, 1 << 20) for name, w in bucket}
    return not made._module.read_whole, boxes, weights


# gpt2 and mixtral have no tensor-parallel plan that is used here.
@pytest.mark.parametrize(
    ("family", "engine"),
    [(f, e) for f in ("llama", "gpt2", "mixtral") for e in ENGINES if f == "llama" or e != "tensor parallel"],
)
def test_values_are_those_of_the_files_bit_for_bit(
    world2: World, families: dict[str, Path], family: str, engine: str
) -> None:
    expected = AutoModelForCausalLM.from_pretrained(families[family], dtype=torch.float32).state_dict()
    for trained in (True, False):
        ranks = world2.run(loaded, families[family], trained, ENGINES[engine])
        assert sum(boxes for _, boxes, _ in ranks) >= len(ranks[0][2]), "every rank's own boxes, copies among them"
        for sliced, _, weights in ranks:
            assert sliced
            common = {name for name in weights if name in expected}
            assert len(common) > 3
            assert all(np.array_equal(weights[name], expected[name].numpy()) for name in common)


def test_what_lies_beside_a_model_is_not_read_and_quantised_weights_are_refused(
    world2: World, families: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(families["gpt2"], folder)
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file({name: tensor + 1 for name, tensor in stored.items()}, tmp_path / "zzz.safetensors")
    before = world2.run(weights_of, folder)
    shutil.copy(tmp_path / "zzz.safetensors", folder / "zzz.safetensors")
    after = world2.run(weights_of, folder)
    assert all(np.array_equal(before[0][name], after[0][name]) for name in before[0])
    for file in folder.glob("model*.safetensors"):
        save_file({n: t.to(torch.float8_e4m3fn) for n, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(RuntimeError, match="as F8_E4M3, and weights are read as"):
        world2.run(weights_of, folder)


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    made = new_engine(folder, trained=False)
    return {name: w.numpy().copy() for bucket in made.full_weights(torch.float32, 1 << 20) for name, w in bucket}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "model"
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False, **WIDE)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="30MB")
    return folder


def test_a_rank_never_holds_the_model(wide: Path, families: dict[str, Path]) -> None:
    """In a world of its own, whose memory nobody has warmed. Reading all of a bfloat16 folder takes the whole model in
    float32, which on two ranks is within two shards: told apart by the ratio."""
    ways: dict[str, dict[str, Any]] = {
        "fsdp": ENGINES["fsdp"],
        "random": {"init": "random"},
        "adapters": {"lora": LoraConfig(rank=4), "trained": True},
        "zero 3": ENGINES["zero 3"],
        "whole": {"whole": True},
    }
    found: dict[str, list[Peak]] = {}
    world = World(2, forked=False)
    try:
        for way in ways.values():
            world.run(start, families["llama"], way)  # imports, first buffers
        for name, way in ways.items():
            found[name] = world.run(start, wide, way)
    finally:
        world.close()
    whole = found.pop("whole")
    assert not [(name, peak) for name, ranks in found.items() for peak in ranks if peak.peak_extra_bytes > peak.bound]
    assert min(p.peak_extra_bytes for p in whole) > 1.5 * max(p.peak_extra_bytes for p in found["fsdp"]), found


def start(folder: Path, way: dict[str, Any]) -> Peak:
    way = dict(way)
    trained, whole = way.pop("trained", False), way.pop("whole", False)
    return peak_of_building(folder, way, trained, whole)
