"""A tiny random model with a tokenizer of single characters: enough to run a recipe in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "0123456789+-*/=?.,:! abcdefghijklmnopqrstuvwxyz\n"
VOCABULARY = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def save_tokenizer(folder: Path) -> None:
    """A tokenizer with one token per character: pad 0, bos 1, eos 2, unknown 3."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def llama_config(
    *, tied: bool = False, hidden: int = 32, layers: int = 2, heads: int = 4, kv_heads: int = 2
) -> LlamaConfig:
    """Grouped-query attention (two key heads), head size hidden / heads."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        # Wider than usual, so that a tiny untrained model has opinions that tests can tell apart.
        initializer_range=0.15,
    )


def save_llama(
    folder: Path, *, tied: bool = False, seed: int = 0, hidden: int = 32, layers: int = 2, kv_heads: int = 2
) -> Path:
    """A random Llama with its tokenizer; returns the folder."""
    config = llama_config(tied=tied, hidden=hidden, layers=layers, kv_heads=kv_heads)
    return save_model(folder, LlamaForCausalLM, config, seed)


def save_model(folder: Path, family: type[PreTrainedModel], config: PretrainedConfig, seed: int) -> Path:
    """A random model of `family` with the tokenizer; returns the folder."""
    torch.manual_seed(seed)
    family(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
