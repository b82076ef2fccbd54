"""Data: sources of prompts, examples and preferences; the tokenizer they use; what the driver checks."""

from rlhf_dist.data.check import check_source
from rlhf_dist.data.ends import end_token_ids
from rlhf_dist.data.of_launch import (
    epoch_source,
    heldout_source,
    open_source,
    tokenizer_of,
    training_source,
    with_steps_of_epochs,
)
from rlhf_dist.data.source import PromptSource, emitted_columns
from rlhf_dist.data.tokenizer import TextTokenizer, has_chat_template

__all__ = [
    "PromptSource",
    "TextTokenizer",
    "check_source",
    "emitted_columns",
    "epoch_source",
    "end_token_ids",
    "has_chat_template",
    "heldout_source",
    "open_source",
    "tokenizer_of",
    "training_source",
    "with_steps_of_epochs",
]
