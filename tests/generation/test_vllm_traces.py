"""Weights through windows learned from vLLM's own loaders: what generates is the model that was sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rlhf_dist.sampling import Sampling
from tests.engines.world import World
from tests.generation import rank
from tests.generation.test_engines import LONG, SAMPLING, SEEDS, SHORT

BASE = {
    # 70 tokens: vLLM pads the vocabulary to a multiple of 64.
    "vocab_size": 70,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**BASE, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**BASE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**BASE, head_dim=32, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**BASE, head_dim=32, tie_word_embeddings=True),
    "gemma-tied": GemmaConfig(**BASE, head_dim=32),
    "phi3": Phi3Config(**BASE, tie_word_embeddings=False),
    "gpt2-tied": GPT2Config(
        vocab_size=70,
        n_positions=512,
        n_embd=128,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.15,
    ),
    "mixtral": MixtralConfig(
        **BASE, head_dim=32, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **BASE,
        head_dim=32,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        tie_word_embeddings=False,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, config in MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
        config.dtype = torch.float32
        config.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    yield made
    made.close()


def _open(folder: Path, size: int) -> None:
    rank.open_engine("vllm", folder, tensor_parallel=size)


def _size(world: World) -> int:
    return len(world._pipes)


@pytest.mark.parametrize("name", MODELS)
def test_what_generates_is_what_was_sent(world: World, folders: dict[str, Path], name: str) -> None:
    world.run(_open, folders[name], _size(world))
    for version, seed in ((1, 5), (2, 6)):
        for answer in world.run(rank.reshard, version, seed):
            assert answer["fallback"] is None and answer["version"] == version
            assert answer["received"] == answer["planned"]
        for prompts in (SHORT, LONG, LONG):  # the third out of the prefix cache, which the sync has emptied
            answers = world.run(rank.generate, prompts, SAMPLING, SEEDS[: 2 * len(prompts)])
            assert max(world.run(rank.largest_difference, seed, prompts, answers[0], SAMPLING)) < 2e-4
            assert min(world.run(rank.largest_difference, seed + 9, prompts, answers[0], SAMPLING)) > 0.1
    world.run(rank.close_engine)


def test_a_model_that_cannot_be_traced_takes_whole_tensors(world: World, folders: dict[str, Path]) -> None:
    world.run(_open, folders["llama"], _size(world))
    for version, seed in ((1, 5), (2, 6)):
        for answer in world.run(rank.reshard, version, seed, False):
            assert answer["fallback"] == "this test wants whole tensors" and answer["version"] == version
    answers: Any = world.run(rank.generate, SHORT, Sampling(n=2, max_tokens=8), SEEDS)
    assert max(world.run(rank.largest_difference, 6, SHORT, answers[0], Sampling(n=2, max_tokens=8))) < 2e-4
    world.run(rank.close_engine)


def _refusal_with(backend: str) -> str:
    """On a rank: what is said of the open model where vLLM has chosen this backend for its experts."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    from workers.engines.generation.vllm_weights import check_experts

    check_experts(rank._engine._model)
    layer = next(one for one in rank._engine._model.modules() if hasattr(one, "w13_weight"))
    chosen = layer.quant_method.unquantized_backend
    layer.quant_method.unquantized_backend = UnquantizedMoeBackend[backend]
    try:
        check_experts(rank._engine._model)
    except ValueError as error:
        return str(error)
    finally:
        layer.quant_method.unquantized_backend = chosen
    return ""


def test_experts_that_vllm_rearranges_after_loading_are_refused(world: World, folders: dict[str, Path]) -> None:
    if _size(world) > 1:
        pytest.skip("the same on every rank")
    world.run(_open, folders["mixtral"], 1)
    assert world.run(_refusal_with, "TRITON") == [""]
    for backend in ("FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS", "AITER"):
        (says,) = world.run(_refusal_with, backend)
        assert "vLLM computes the experts of model.layers.0" in says and f"with {backend}" in says
    world.run(rank.close_engine)
