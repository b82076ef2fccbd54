"""Model families: training gives what the library gives for each row alone, or names why it does not start."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.engines.world import World
from tests.families import tiny_config, tiny_model
from tests.family_check import Verdict, check_training

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


def verdict(family: str, changes: dict[str, Any], engine: dict[str, Any]) -> Verdict:
    """On a rank: one family at tiny size."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        model = tiny_model(tiny_config(family, **changes))
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
        dist.barrier()
        found = check_training(family, Path(shared[0]), model, **engine)
        dist.barrier()
    return found


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


def test_an_encoder_is_refused_by_name(world1: World) -> None:
    found = world1.run(verdict, "bert", {}, {})[0]
    assert found.state == "refused" and "tokens of this model see tokens after them" in found.why
    assert world1.run(verdict, "bert", {"is_decoder": True}, {})[0].state == "exact"


def test_layers_with_a_state_need_whole_rows(world2: World) -> None:
    found = world2.run(verdict, "mamba2", {}, {"sequence_parallel": 2})
    assert {one.state for one in found} == {"refused"} and "sequence_parallel must be 1" in found[0].why, found
