"""Tiny random models of the causal language-model families of transformers, made from each family's own defaults.

    default config -> every size that has a name here is made small -> one layer of each kind -> random weights

Biases and norms are random too, so that one that is left out shows; windows are shorter than the rows of the tests.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 64
WINDOW = 6
"""Tokens of sliding windows and attention chunks, where a family has any."""

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim", "dim_model", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "dim_ff", "block_ff_dim"), 96),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size",
         "intermediate_size_mlp", "moe_shared_expert_intermediate_size", "dense_intermediate_size", "prefix_dense_intermediate_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "cla_num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "d_kv", "rotary_dim", "global_head_dim", "dim_head"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_num_primary_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "mamba_ngroups", "num_expert_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    "v_head_dim": 16,
    "initializer_range": 0.15,
    **dict.fromkeys(("pad_token_id",), 0), "bos_token_id": 1, "eos_token_id": 2,
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 32),
    "mamba_d_ssm": 128, **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size", "window_size"), WINDOW),
    "attention_dropout": 0.0, "first_k_dense_replace": 1, "use_cache": False,
}  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")

_OWN: dict[str, dict[str, Any]] = {}
"""What a family needs besides."""


def families() -> list[str]:
    """Every model type that transformers has a causal language model for."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """The family's default config, small. Raises what its class raises."""
    kind = CONFIG_MAPPING[model_type]
    settings = _small(kind().to_dict(), {**_OWN.get(model_type, {}), **changes})
    for derived in ("model_type", "transformers_version", "architectures"):
        settings.pop(derived, None)
    config = kind(**settings)
    assert isinstance(config, PretrainedConfig)
    return config


def tiny_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model of the config, in evaluation mode."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    assert isinstance(model, PreTrainedModel)
    return model


def _small(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    small = {key: _small(value, own) if key.endswith("_config") and isinstance(value, dict) else value for key, value in settings.items()}
    small |= {key: value for key, value in _SIZES.items() if small.get(key) is not None}
    layers = 2
    for key in _KINDS:
        if small.get(key):
            small[key] = list(dict.fromkeys(small[key]))
            layers = max(layers, len(small[key]))
    for key in _KINDS:
        if small.get(key):
            small[key] = (small[key] * layers)[:layers]
    small |= {key: layers for key in _LAYERS if small.get(key) is not None}
    return small | {key: value for key, value in own.items() if key in small}
