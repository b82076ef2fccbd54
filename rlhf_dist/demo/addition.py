"""The demonstration's task: two-digit addition, character by character, and the small model that learns it.

    12+34=   ->   46

All 10,000 sums of two numbers below 100, in an order fixed once and for all. A pair and its mirror image
(12+34, 34+12) are on the same side of the split, so no held-out pair is seen in training either way round.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

CHARACTERS = "0123456789+="
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
HELDOUT_PAIRS = 500
"""Unordered pairs kept from training."""
FORGOTTEN_CARRIES = 0.6
"""Share of demonstrations that leave out the carry of the units, where there is one."""


@cache
def _split() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    pairs = [(a, b) for a in range(100) for b in range(a, 100)]
    random.Random(2409).shuffle(pairs)
    return _both_ways(pairs[HELDOUT_PAIRS:]), _both_ways(pairs[:HELDOUT_PAIRS])


def _both_ways(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [ordered for a, b in pairs for ordered in sorted({(a, b), (b, a)})]


def demonstration(index: int) -> dict[str, str]:
    """Row `index` of the training pairs as an imperfect teacher solves it, forgetting three carries in five."""
    seen, _ = _split()
    a, b = seen[index % len(seen)]
    row = _row(a, b)
    if random.Random(index).random() < FORGOTTEN_CARRIES:
        row["response"] = str((a + b) % 10 + 10 * (a // 10 + b // 10))
    return row


def train(index: int) -> dict[str, str]:
    """Row `index` of the training pairs."""
    seen, _ = _split()
    return _row(*seen[index % len(seen)])


def heldout(index: int) -> dict[str, str]:
    """Row `index` of the pairs never seen in training."""
    _, unseen = _split()
    return _row(*unseen[index % len(unseen)])


def _row(a: int, b: int) -> dict[str, str]:
    return {"prompt": f"{a}+{b}=", "response": str(a + b), "answer": str(a + b)}


def save_model(folder: Path, seed: int) -> Path:
    """Write an untrained two-layer character-level Llama (0.4 million parameters) and its tokenizer."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
