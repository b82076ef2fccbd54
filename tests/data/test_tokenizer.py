"""The tokenizer that needs no torch gives what transformers gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_dist.data import TextTokenizer, has_chat_template

TEXTS = ["12+3=?", "what is 7 * 8?\n", "", "Ünknown characters"]
CHATS = [
    [{"role": "user", "content": " 1+1 "}],
    [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "3"},
    ],
]


def test_ids_and_rendered_chats_equal_those_of_transformers(tokenizer: Path) -> None:
    ours, theirs = TextTokenizer(tokenizer), AutoTokenizer.from_pretrained(tokenizer)
    for special in (True, False):
        expected = [theirs(text, add_special_tokens=special)["input_ids"] for text in TEXTS]
        assert ours.encode(TEXTS, special_tokens=special) == expected
    for chat in CHATS:
        assert ours.render(chat) == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        rendered = ours.encode([ours.render(chat)], special_tokens=False)[0]
        assert rendered == theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ours.eos_id == theirs.eos_token_id == 2


def test_a_tokenizer_that_begins_texts_itself_does_so_for_texts_only(tmp_path: Path) -> None:
    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    ours, theirs = TextTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode(["a a"], special_tokens=True) == [[0, 2, 2]] == [theirs("a a")["input_ids"]]
    assert ours.encode(["a a"], special_tokens=False) == [[2, 2]]


def test_where_a_chat_template_may_be(tokenizer: Path, plain_tokenizer: Path, tmp_path: Path) -> None:
    assert has_chat_template(tokenizer) and not has_chat_template(plain_tokenizer)
    for template, found in (("x", True), ([{"name": "default", "template": "x"}], True), ([], False), (None, False)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert has_chat_template(tmp_path) is found


def test_what_is_missing_is_named(plain_tokenizer: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer folder"):
        TextTokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no tokenizer.json"):
        TextTokenizer(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        TextTokenizer(plain_tokenizer).render(CHATS[0])
    with pytest.raises(ValueError, match="unknown role tool"):
        TextTokenizer(tokenizer).render([{"role": "tool", "content": "x"}])
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        has_chat_template(tmp_path)
