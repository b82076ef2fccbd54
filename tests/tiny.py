"""Tiny real models for tests: those of the kit for users, and others with the same tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf_dist.testing.tiny_model import VOCABULARY, llama_config, save_llama, save_model, save_tokenizer

__all__ = [
    "VOCABULARY",
    "llama_config",
    "save_classifier",
    "save_judge",
    "save_llama",
    "save_qwen3",
    "save_tokenizer",
]


def save_qwen3(folder: Path, *, seed: int = 0) -> Path:
    """A random Qwen3 (norms on queries and keys, tied embeddings) with its tokenizer; returns the folder."""
    config = Qwen3Config(**(llama_config(tied=True).to_dict() | {"head_dim": 16, "model_type": "qwen3"}))
    return save_model(folder, Qwen3ForCausalLM, config, seed)


def save_classifier(folder: Path, *, seed: int = 0) -> Path:
    """A random one-label Llama sequence classifier (a reward model) with its tokenizer; returns the folder."""
    config = llama_config()
    config.num_labels = 1
    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_judge(folder: Path, *, says: str = "12 ", bias: float = 8.0) -> Path:
    """A random Phi that says little else than the characters of `says`: its logits have a bias. Returns the folder."""
    config = PhiConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = PhiForCausalLM(config)
    with torch.no_grad():
        model.lm_head.bias[[VOCABULARY[character] for character in says]] += bias
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
