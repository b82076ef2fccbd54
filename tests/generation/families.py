"""Tiny random models of many families: heads of 32, two layers, 96 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from workers.engines.files.file_tensors import kept_buffers

VOCABULARY = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Wider than usual, so that a tiny untrained model has opinions that tests can tell apart.
    "initializer_range": 0.15,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma": {},
    "gemma3_text": {"sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {},
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 1.0},
    "smollm3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_EXPERTS, "decoder_sparse_step": 1},
    "qwen2_moe": {**_EXPERTS, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 64},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": {"num_key_value_heads": 4},
    "phi": {},
    "stablelm": {},
    "starcoder2": {},
    "glm4": {},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "topk_method": "noaux_tc",
        "q_lora_rank": 32,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "head_dim": 64,
        "num_key_value_heads": 4,
    },
}
"""model_type -> what differs from `COMMON`."""


def save_family(folder: Path, model_type: str, *, seed: int = 0) -> Path:
    """A random model of a family as transformers writes it, without a tokenizer; returns the folder."""
    config = AutoConfig.for_model(model_type, **{**COMMON, **FAMILIES.get(model_type, {})})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in (*model.parameters(), *kept_buffers(model).values()):
            if not bool(weight.any()):  # biases: zeros hide whoever leaves them out
                weight.normal_(std=0.15)
    model.save_pretrained(folder)
    return folder
