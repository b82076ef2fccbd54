"""Models are read by slices: a rank holds its shards and one slice on the way, and has the values of the files."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

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


WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8192}
"""42 M parameters, 168 MB in float32; the largest tensor 16.8 MB."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "model"
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False, **WIDE)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="30MB")
    return folder


def read_whole(*args: Any) -> None:
    from workers.engines.slices import ReadWhole

    raise ReadWhole("the test says so")


def peak_of_building(folder: Path, engine: dict[str, Any], whole: bool) -> tuple[int, int, int]:
    """(most private memory beside what there was, this rank's shards, the largest tensor), bytes, until it is loaded.

    Pages of the files, which ranks of a node share and the kernel may drop, are not the process's own. The passes
    that an engine makes to find its way come after, and need what passes need.
    """
    from workers.engines import models
    from workers.engines.packed_engine import PackedEngine

    skeleton, choose = models._skeleton, PackedEngine._choose_way
    if whole:
        models._skeleton = read_whole  # type: ignore[assignment]
    process, most, stop = psutil.Process(os.getpid()), [0], threading.Event()

    def own() -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    before = own()

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], own() - before)
            time.sleep(0.001)

    def loaded_now(self: Any) -> None:
        stop.set()
        watcher.join()
        choose(self)

    PackedEngine._choose_way = loaded_now  # type: ignore[method-assign]
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        made = new_engine(folder, trained=False, **engine)
    finally:
        stop.set()
        watcher.join()
        models._skeleton, PackedEngine._choose_way = skeleton, choose  # type: ignore[method-assign]
    shards = [shard for held in made.local_shards().values() for shard in held]
    largest = max(int(np.prod(p.shape)) * 4 for p in made.layout().parameters.values())
    return most[0], sum(shard.numel() * shard.element_size() for shard in shards), largest


def test_a_rank_never_holds_the_model(wide: Path, families: dict[str, Path]) -> None:
    """In worlds of their own, whose memory nobody has warmed. Reading all of a bfloat16 folder takes the whole model
    in float32, which on two ranks is within two shards: told apart by the ratio."""
    found = {}
    for whole, engines in ((False, ("fsdp", "zero 3")), (True, ("fsdp",))):
        world = World(2)
        try:
            for engine in engines:
                world.run(loaded, families["llama"], False, ENGINES[engine])  # imports, first buffers
            for engine in engines:
                found[engine, whole] = world.run(peak_of_building, wide, ENGINES[engine], whole)
        finally:
            world.close()
    over = {key: [peak > 2 * shard + largest for peak, shard, largest in ranks] for key, ranks in found.items()}
    del over["fsdp", True]
    assert not any(any(ranks) for ranks in over.values()), found
    sliced, whole = (max(peak for peak, _, _ in found["fsdp", how]) for how in (False, True))
    assert whole > 1.5 * sliced, found
