"""Load, train a step, sync, generate, export, read the export in transformers and in vLLM: one policy throughout.

Sums are compared in float32. vLLM's CPU build runs these families; it has no attention for heads below 32, and of
those tried its latent attention (DeepSeek-V3) differs from transformers' on a CPU by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from rlhf_dist.config import EngineConfig, LoraConfig
from tests.engines.world import World
from tests.generation import rank
from tests.generation.families import save_family
from tests.generation.test_engines import SAMPLING, SEEDS, SHORT
from tests.tiny import save_tokenizer
from workers.model_support import TOLERANCE, ModelSupport, model_support

NATIVE = ("llama", "qwen2", "qwen3", "gemma3_text", "phi3", "granite", "mixtral", "qwen3_moe", "gpt2")
THROUGH_TRANSFORMERS = ("gpt_neox", "phi", "olmo2")
"""vLLM runs them on transformers' own classes, which the trainer in the same process uses too."""
ENGINES: dict[str, EngineConfig] = {
    "mixtral-zero3": EngineConfig(name="deepspeed", zero_stage=3),
    "gpt_neox-zero1": EngineConfig(name="deepspeed", zero_stage=1),
    "gpt2-lora": EngineConfig(lora=LoraConfig(rank=4, alpha=8.0, targets=["c_attn", "c_fc", "c_proj"])),
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World(1)
    yield made
    made.close()


@pytest.mark.parametrize("name", [*NATIVE, *THROUGH_TRANSFORMERS, *ENGINES])
def test_trainer_export_and_vllm_are_one_policy(world: World, tmp_path: Path, name: str) -> None:
    family = name.partition("-")[0]
    save_family(tmp_path / "model", family)
    save_tokenizer(tmp_path / "model")
    [found] = world.run(model_support, tmp_path / "model", tmp_path / "out", ENGINES.get(name))
    assert isinstance(found, ModelSupport)
    backend = "transformers backend" if family in THROUGH_TRANSFORMERS else "native"
    assert (found.trains, found.export, found.vllm, found.sync) == ("ok", "ok", backend, "pieces"), found
    assert len(found.differences) == 4 and max(found.differences) <= TOLERANCE
    assert world.run(_shared_classes)[0] == []
    _check_folder(tmp_path / "model", tmp_path / "out")


def _shared_classes() -> list[str]:
    """Classes of transformers in this process that vLLM has left something in."""
    import transformers

    kinds = (transformers.GPTNeoXModel, transformers.PhiModel, transformers.Olmo2Model)
    return [kind.__name__ for kind in kinds if "vllm" in repr([*kind.__mro__, kind.__init__.__module__])]


def _check_folder(source: Path, out: Path) -> None:
    assert _weights(out) == _weights(source)  # names, shapes: tied heads stay tied
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["architectures"] == json.loads((source / "config.json").read_text())["architectures"]


def _weights(folder: Path) -> dict[str, Any]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            found |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    return found


def test_the_embedded_engine_takes_fused_experts_by_pieces_and_whole(world: World, tmp_path: Path) -> None:
    world.run(rank.open_engine, "transformers", save_family(tmp_path, "mixtral"))
    [report] = world.run(rank.reshard, 1, 5)
    assert report["fallback"] is None
    for seed in (5, 6):
        if seed == 6:
            assert world.run(rank.sync, 2, seed)[0]["version"] == 2
        [answers] = world.run(rank.generate, SHORT, SAMPLING, SEEDS)
        assert world.run(rank.largest_difference, seed, SHORT, answers, SAMPLING)[0] < 1e-4
    world.run(rank.close_engine)
