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

_NAMES: dict[str, Any] = {
    "vocab_size vocab_size_per_layer_input n_words decoder_vocab_size": VOCABULARY,
    "hidden_size d_model n_embd embed_dim emb_dim word_embed_proj_dim dim_model lru_width": 64,
    "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size dim_ff block_ff_dim": 96,
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size": 32,
    "intermediate_size_mlp moe_shared_expert_intermediate_size dense_intermediate_size": 32,
    "prefix_dense_intermediate_size": 32,
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads": 4,
    "num_key_value_heads num_kv_heads swa_num_key_value_heads cla_num_kv_heads": 2,
    "head_dim kv_channels attention_head_dim d_kv rotary_dim global_head_dim dim_head": 16,
    "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length": 512,
    "num_experts num_local_experts n_routed_experts moe_num_experts moe_num_primary_experts": 4,
    "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts": 2,
    "n_group topk_group n_groups mamba_n_groups mamba_ngroups num_expert_group": 1,
    "q_lora_rank kv_lora_rank o_lora_rank hidden_size_per_layer_input": 16,
    "qk_rope_head_dim qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank": 8,
    "mamba_n_heads mamba_num_heads n_mamba_heads": 4,
    "mamba_d_head mamba_head_dim mamba_headdim": 32,
    "mamba_d_ssm": 128,
    "mamba_chunk_size chunk_size": 8,
    "linear_num_key_heads linear_num_value_heads": 2,
    "linear_key_head_dim linear_value_head_dim": 16,
    "sliding_window attention_chunk_size attention_window_size window_size": WINDOW,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 1,
    "use_cache": False,
}
_SIZES = {name: value for names, value in _NAMES.items() for name in names.split()}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")

_MLA: dict[str, Any] = {"head_dim": 8, "qk_head_dim": 16, "num_key_value_heads": 4}
_PER_LAYER: dict[str, Any] = {
    "per_layer_config": {},
    "intermediate_size": 96,
    "activation_sparsity_pattern": [0.0, 0.0],
}
_OWN: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2},
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "kimi_linear": _MLA,
    "longcat_flash": {**_MLA, "zero_expert_num": 2, "num_hidden_layers": 4},
    "minicpm3": _MLA,
    "youtu": _MLA,
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gemma3n": _PER_LAYER,
    "gemma3n_text": {**_PER_LAYER, "num_kv_shared_layers": 0},
    "gemma4": _PER_LAYER,
    "gemma4_text": _PER_LAYER,
    "gemma4_unified": _PER_LAYER,
    "gemma4_unified_text": _PER_LAYER,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "mamba2": {"head_dim": 32},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "xlnet": {"d_head": 16},
    "zamba2": {"num_query_groups": 4, "attention_hidden_size": 128, "attention_head_dim": 32, "hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid"]},
}
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
    small = {
        key: _small(value, own) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in settings.items()
    }
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
    return small | {key: value for key, value in own.items() if key in settings}
