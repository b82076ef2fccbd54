"""Attention that short rows do not show: a field of config.json that the packed pass does not know of is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from transformers import PretrainedConfig

from tests.engines.world import World
from tests.families import tiny_config, tiny_model
from tests.family_check import Verdict, check_training
from workers.engines.model.unseen import caps_scores, head_cap, unseen


@pytest.mark.parametrize(
    ("fields", "windows", "softcaps", "named"),
    [
        ({}, set(), set(), ""),
        ({"sliding_window": 4096}, set(), set(), "sliding_window=4096"),
        ({"sliding_window": 4096}, {4096}, set(), ""),
        ({"sliding_window": 4096, "use_sliding_window": False}, set(), set(), ""),
        ({"sliding_window": 4096, "layer_types": ["full_attention"]}, set(), set(), ""),
        ({"attention_chunk_size": 8192, "layer_types": ["chunked_attention"]}, {4096}, set(), "attention_chunk_size"),
        ({"attention_window": [512, 1024]}, {512}, set(), "attention_window=1024"),
        ({"attn_logit_softcapping": 50.0}, set(), set(), "attn_logit_softcapping=50"),
        ({"attn_logit_softcapping": 50.0}, set(), {30.0}, "attn_logit_softcapping=50"),
        ({"attn_logit_softcapping": 50.0}, set(), {50.0}, ""),
        ({"attn_logit_softcapping": None}, set(), set(), ""),
        ({"index_topk": 2048}, set(), set(), "index_topk=2048"),
        ({"keep_window_size": 2048}, set(), set(), "keep_window_size=2048"),
    ],
)
def test_a_field_that_no_layer_asked_for_is_a_reason_against_packing(
    fields: dict[str, Any], windows: set[int], softcaps: set[float], named: str
) -> None:
    found = unseen(PretrainedConfig(**fields), windows, softcaps)
    assert (named in found and found.startswith("config.json has")) if named else found == ""
    assert caps_scores(PretrainedConfig(**fields)) == bool(fields.get("attn_logit_softcapping"))


def test_a_cap_on_logits_that_no_matrix_has_is_left_to_the_models_own_head() -> None:
    assert "logits_soft_cap=30" in head_cap(PretrainedConfig(logits_soft_cap=30.0))
    assert head_cap(PretrainedConfig(final_logit_softcapping=30.0)) == "", "heads.py has it"


def trained(folder: Path, family: str, fields: dict[str, Any], engine: dict[str, Any]) -> Verdict:
    """On a rank: a tiny model whose config.json has `fields` that its family need not know, trained for a step."""
    config = tiny_config(family)
    for field, value in fields.items():
        setattr(config, field, value)
    model = tiny_model(config)
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return check_training(family, folder, model, **engine)


@pytest.mark.parametrize(
    ("family", "fields", "way"),
    [
        ("gemma2", {"attn_logit_softcapping": 50.0}, "packed rows, prompts shared"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "padded rows with the library's eager attention"),
        ("llama", {"attention_chunk_size": 8192}, "padded rows with the library's sdpa attention"),
        ("llama", {"index_topk": 2048}, "padded rows with the library's sdpa attention"),
        ("llama", {"logits_soft_cap": 30.0}, "packed rows, prompts shared, the model's own head in chunks"),
    ],
)
def test_a_model_takes_the_way_that_is_right_for_long_rows(
    world1: World, tmp_path: Path, family: str, fields: dict[str, Any], way: str
) -> None:
    # Scores of a tiny model are far below 50, and rows of twelve tokens below 2048: nothing of it shows.
    found = world1.run(trained, tmp_path, family, fields, {})[0]
    assert (found.state, found.way) == ("exact", way), found


def test_where_rows_cannot_be_padded_the_model_is_refused_by_its_field(world2: World, tmp_path: Path) -> None:
    found = world2.run(trained, tmp_path, "llama", {"index_topk": 2048}, {"sequence_parallel": 2})[0]
    assert found.state == "refused" and "config.json has index_topk=2048" in found.why, found
