"""Tiny real models for tests: those of the kit for users, and others with the same tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, Qwen3Config, Qwen3ForCausalLM

from rlhf_dist.testing.tiny_model import VOCABULARY, llama_config, save_llama, save_model, save_tokenizer

__all__ = ["VOCABULARY", "llama_config", "save_classifier", "save_llama", "save_qwen3", "save_tokenizer"]


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
