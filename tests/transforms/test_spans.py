"""Parts of a text, found among its tokens."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_dist.batch import Batch, Column
from rlhf_dist.dataflow.host import as_result
from rlhf_dist.transforms import span_rewards
from workers.spelling import text_ends


def of_bytes() -> PreTrainedTokenizerFast:
    """A token for each byte, and one for "ab"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: at for at, letter in enumerate([*letters, "ab", "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def test_a_character_ends_with_its_last_token_and_a_special_token_is_no_text() -> None:
    tokenizer = of_bytes()
    ids = tokenizer.encode("abé€ x")
    assert len(ids) == 1 + 2 + 3 + 2
    # "ab", two bytes of é, three of the euro sign, the space, x; then the end.
    assert text_ends(tokenizer, [*ids, tokenizer.eos_token_id]) == [2, 2, 3, 3, 3, 4, 5, 6, 6]
    assert text_ends(tokenizer, ids[:4])[-1] == len(tokenizer.decode(ids[:4]))  # cut within a character
    assert text_ends(tokenizer, []) == []


def test_tokens_that_spell_a_part_have_its_value() -> None:
    # "good bad good": tokens of characters 0-4, 4-8, 8-13, and an end without text, which does not count.
    mask = Column(np.array([1, 1, 1, 1, 1], np.uint8), np.array([0, 4, 5]))
    batch = Batch(
        {
            "response": Column.strings(["good bad good", "x"]),
            "response_mask": mask,
            "text_ends": Column(np.array([4, 8, 13, 13, 1], np.int32), mask.offsets),
            "fine": Column.strings(["good\nbad good\n", ""]),
            "poor": Column.strings([" bad | never said", "x"]),
        }
    )
    good = as_result(span_rewards(batch, spans={"fine": 1.0}))
    # "good" is found at 0; "bad good" at 5, in the second and the third token.
    assert (
        good.columns["token_rewards"].values.tolist() == [1, 1, 1, 0, 0] and good.metrics["spans_not_found"].value == 0
    )
    both = as_result(span_rewards(batch, spans={"fine": 1.0, "poor": -0.5}, separator="|"))
    # One text "good\nbad good" is nowhere; "bad" is in the second token, "never said" nowhere, "x" in the other row.
    assert both.columns["token_rewards"].values.tolist() == [0, -0.5, 0, 0, -0.5]
    assert both.metrics["spans_not_found"].value == 0.5
    masked = batch.with_columns(response_mask=Column(np.array([1, 0, 1, 1, 1], np.uint8), mask.offsets))
    assert as_result(span_rewards(masked, spans={"fine": 1.0})).columns["token_rewards"].values[1] == 0
    with pytest.raises(ValueError, match="needs columns"):
        span_rewards(batch, spans={})
