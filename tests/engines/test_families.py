"""Model families: training gives what the library gives for each row alone, or names why it does not start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig, RolloutConfig
from tests.engines.losses import TokenLoss
from tests.engines.world import World
from tests.families import tiny_config, tiny_model
from tests.family_check import Verdict, log_probs_alone, rows
from tests.models_table import verdict

MOST_USED = """
    apertus arcee bamba bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe exaone4 falcon
    falcon_h1 falcon_mamba gemma gemma2 gemma3_text gemma3n_text gemma4 gemma4_text glm glm4 glm4_moe gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid helium hunyuan_v1_dense jamba lfm2
    lfm2_moe llama llama4_text mamba mamba2 minimax mistral mixtral mpt nemotron nemotron_h olmo olmo2 olmo3 olmoe
    opt phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next smollm3 stablelm
    starcoder2 xglm zamba2
""".split()
LIBRARY_MASKS = {"bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "xglm"}
"""Families whose attention does not go through the library's interface: rows are padded, with its own masks."""

LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
    },
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "a window that lives only in the mask": ("phimoe", {"sliding_window": 5}),
    "a window in some layers": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "frequencies for rows beyond a length": ("phi3", LONGROPE),
    "frequencies of each row's length": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        },
    ),
    "a soft cap in a nested config": ("gemma4", {"final_logit_softcapping": 2.0}),
    "soft caps on scores and logits": ("gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0}),
    "a factor on the logits": ("cohere", {"logit_scale": 0.4}),
}


def sweep(families: list[str], engine: dict[str, Any]) -> list[Verdict]:
    """On a rank: several families in one process."""
    return [verdict(family, {}, engine) for family in families]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_the_most_used_families_train_exactly(world1: World, part: int) -> None:
    found = world1.run(sweep, MOST_USED[part::4], {})[0]
    assert {
        one.family: (one.state, one.difference, one.gradient, one.why) for one in found if one.state != "exact"
    } == {}
    padded = {one.family for one in found if "padded" in one.way}
    assert padded == LIBRARY_MASKS & set(MOST_USED[part::4])
    assert all("prompts shared" in one.way for one in found if one.family not in padded)


@pytest.mark.parametrize("kind", KINDS)
def test_what_short_rows_cannot_show_is_exact_as_well(world1: World, kind: str) -> None:
    family, changes = KINDS[kind]
    found = world1.run(verdict, family, changes, {})[0]
    assert found.state == "exact" and "packed" in found.way, found


@pytest.mark.parametrize(
    "engine",
    [{"packing": False}, {"activation_checkpointing": True}, {"share_prompts": False}, {"zero_stage": 2}],
    ids=lambda engine: "-".join(engine),
)
@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1", "phi3", "bloom"])
def test_settings_of_the_engine_change_nothing(world1: World, family: str, engine: dict[str, Any]) -> None:
    found = world1.run(verdict, family, LONGROPE if family == "phi3" else {}, engine)
    assert found[0].state == "exact", found


@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss", "gptj", "phi"])
def test_every_rank_goes_the_same_way(world2: World, family: str) -> None:
    found = world2.run(verdict, family, {}, {})
    assert {one.state for one in found} == {"exact"} and len({one.way for one in found}) == 1, found


@pytest.mark.parametrize("engine", [{"sequence_parallel": 2}, {"tensor_parallel": 2}], ids=["sp", "tp"])
@pytest.mark.parametrize("family", ["gemma3n_text", "apertus"])
def test_tokens_and_layers_cut_over_ranks_are_exact_or_refused(
    world2: World, family: str, engine: dict[str, Any]
) -> None:
    found = world2.run(verdict, family, {}, engine)
    # The activation of this family has parameters, which see a part of the width.
    refused = family == "apertus" and "tensor_parallel" in engine
    assert {one.state for one in found} == {"refused" if refused else "exact"}, found
    assert not refused or "act_fn.alpha_p whole among layers that are cut" in found[0].why


def test_dropout_stays_off_where_activations_are_recomputed(world1: World) -> None:
    for family in ("opt", "xglm"):
        changes = {"dropout": 0.3, "attention_dropout": 0.3}
        found = world1.run(verdict, family, changes, {"activation_checkpointing": True})[0]
        assert found.state == "exact", found


def test_frequencies_are_those_of_whole_rows_where_ranks_have_a_piece_each(world2: World) -> None:
    dynamic = KINDS["frequencies of each row's length"]
    for family, changes in (("phi3", LONGROPE), dynamic):
        found = world2.run(verdict, family, changes, {"sequence_parallel": 2})
        assert {one.state for one in found} == {"exact"}, found


def test_an_encoder_is_refused_by_name(world1: World) -> None:
    found = world1.run(verdict, "bert", {}, {})[0]
    assert found.state == "refused" and "tokens of this model see tokens after them" in found.why
    assert world1.run(verdict, "bert", {"is_decoder": True}, {})[0].state == "exact"


def test_layers_with_a_state_need_whole_rows(world2: World) -> None:
    found = world2.run(verdict, "mamba2", {}, {"sequence_parallel": 2})
    assert {one.state for one in found} == {"refused"} and "sequence_parallel must be 1" in found[0].why, found


def balanced_step(folder: Path, budget: int, packing: bool = True) -> tuple[dict[str, np.ndarray], float]:
    """On a rank: one step on half of the rows with a balance loss; parameters after it, and the loss."""
    from workers.engines.training.fsdp import FsdpEngine

    rank, world = dist.get_rank(), dist.get_world_size()
    engine = FsdpEngine(
        model=ModelConfig(path=str(folder)),
        engine=EngineConfig(micro_batch_tokens=budget, router_aux_loss=0.5, packing=packing),
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-3),
        head="policy",
        device=torch.device("cpu"),
        seed=0,
    )
    batch = rows()
    metrics = engine.step(batch.take(np.arange(rank, batch.num_rows, world)), TokenLoss())
    full = dict(pair for bucket in engine.full_weights(torch.float32, 1 << 30) for pair in bucket)
    return {name: tensor.numpy() for name, tensor in full.items()}, metrics["router_balance"].value


def test_the_balance_loss_of_experts_is_each_rows_own_however_a_batch_is_cut(
    world1: World, world2: World, tmp_path: Path
) -> None:
    model = tiny_model(tiny_config("mixtral"))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = []
        for prompt, response in zip(rows()["prompt_ids"].rows(), rows()["response_ids"].rows(), strict=True):
            ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
            wanted.append(float(model(input_ids=ids, output_router_logits=True).aux_loss))
    results = [world1.run(balanced_step, tmp_path, 10_000)[0], world1.run(balanced_step, tmp_path, 30)[0]]
    results.append(world2.run(balanced_step, tmp_path, 60)[0])
    results.append(world1.run(balanced_step, tmp_path, 60, False)[0])
    for weights, balance in results:
        assert balance == pytest.approx(np.mean(wanted), rel=1e-4)
        for name, values in results[0][0].items():
            np.testing.assert_allclose(weights[name], values, atol=2e-5, err_msg=name)


def test_a_family_without_a_balance_loss_says_so(world1: World) -> None:
    found = world1.run(verdict, "llama", {}, {"router_aux_loss": 0.1})[0]
    assert found.state == "refused" and "no load-balancing loss" in found.why


def values_of(folder: Path) -> list[np.ndarray]:
    """On a rank: values of a trunk with a head of ones."""
    from workers.engines.training.fsdp import FsdpEngine

    engine = FsdpEngine(
        model=ModelConfig(path=str(folder)),
        engine=EngineConfig(micro_batch_tokens=64),
        optimizer=None,
        head="value",
        device=torch.device("cpu"),
        seed=0,
    )
    return engine.forward(rows(), ("values",))["values"].rows()


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", "phi3", "gpt2", "bloom", "mixtral", "falcon"])
def test_values_are_those_of_each_row_alone(world1: World, tmp_path: Path, family: str) -> None:
    config = tiny_config(family)
    config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    model.score.weight.data.fill_(0.3)
    model.save_pretrained(tmp_path)
    found = world1.run(values_of, tmp_path)[0]
    for row, (prompt, response) in enumerate(
        zip(rows()["prompt_ids"].rows(), rows()["response_ids"].rows(), strict=True)
    ):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        hidden = model.base_model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
        np.testing.assert_allclose(found[row], (0.3 * hidden.sum(-1)).detach().numpy(), atol=2e-4)


def bfloat16_log_probs(folder: Path) -> np.ndarray:
    """On a rank: log-probs of a frozen model that computes in bfloat16."""
    from workers.engines.training.fsdp import FsdpEngine

    engine = FsdpEngine(
        model=ModelConfig(path=str(folder)),
        engine=EngineConfig(micro_batch_tokens=64, dtype="bfloat16"),
        optimizer=None,
        head="policy",
        device=torch.device("cpu"),
        seed=0,
    )
    return engine.forward(rows(), ("log_probs",))["log_probs"].values


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "minicpm3", "qwen3_5_text", "gpt_oss", "falcon_h1"])
def test_in_bfloat16_a_family_is_as_far_off_as_the_library_is(world1: World, tmp_path: Path, family: str) -> None:
    model = tiny_model(tiny_config(family))
    model.save_pretrained(tmp_path)
    truth = log_probs_alone(model, rows())
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager").eval()
    found, library = world1.run(bfloat16_log_probs, tmp_path)[0], log_probs_alone(half, rows())
    assert np.abs(found - library).mean() < 0.08
    assert np.abs(found - truth).mean() < 2 * np.abs(library - truth).mean() + 1e-3


@pytest.mark.parametrize("family", ["mamba", "bamba"])
def test_generation_refuses_a_family_that_does_not_go_on_from_keys_and_values(tmp_path: Path, family: str) -> None:
    from workers.engines.generation.transformers import TransformersEngine

    tiny_config(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not follow from a cache of keys and values; set rollout.engine=vllm"):
        TransformersEngine(
            model_path=str(tmp_path),
            rollout=RolloutConfig(engine="transformers", dtype="float32"),
            rank=0,
            world=1,
            device=torch.device("cpu"),
        )


def leaky(folder: Path, dtype: str) -> str:
    """On a rank: the way of an engine whose layers with a state are not kept to rows."""
    from workers.engines.model import models
    from workers.engines.training.fsdp import FsdpEngine

    by_row = models.mix_by_row
    models.mix_by_row = lambda model: []  # type: ignore[assignment]
    try:
        engine = FsdpEngine(
            model=ModelConfig(path=str(folder)),
            engine=EngineConfig(dtype=dtype),
            optimizer=None,
            head="policy",
            device=torch.device("cpu"),
            seed=0,
        )
    finally:
        models.mix_by_row = by_row
    return f"{engine._way}; {engine.remarks}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_that_leaks_between_rows_is_seen_in_any_dtype(world1: World, tmp_path: Path, dtype: str) -> None:
    for family in ("mamba2", "falcon_h1", "lfm2", "qwen3_5_text"):
        folder = tmp_path / family
        tiny_model(tiny_config(family)).save_pretrained(folder)
        found = world1.run(leaky, folder, dtype)[0]
        assert found.startswith("padded rows") and "packed rows: " in found, (family, found)
