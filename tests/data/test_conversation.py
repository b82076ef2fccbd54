"""Turns as tokens: against the whole conversation rendered at once, for the templates that families use.

Where the two differ, and why, is part of what is tested: the tokens that a model has drawn are never written anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_dist.data.conversation import Conversation
from rlhf_dist.data.ends import end_token_ids
from rlhf_dist.data.tokenizer import TextTokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' }}"
    "{{ m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
THOUGHTLESS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|begin|>", "<|endoftext|>"]
TURNS = [("what is 12+30?", "thought</think>i call"), ("42", "the sum is 42"), ("thanks\n", "bye")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte pairs, so that a text has several ways to be cut into tokens."""
    merges = [("t", "h"), ("i", "s"), ("4", "2"), ("Ċ", "Ċ"), ("th", "a")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    where = tmp_path_factory.mktemp("bpe")
    fast.save_pretrained(where)
    return where


def held(folder: Path, template: str, *, cut: bool = False) -> tuple[TextTokenizer, Conversation]:
    """TURNS, the model's as the tokenizer would cut them, and ended by the model unless cut."""
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = TextTokenizer(folder)
    ends = end_token_ids(folder)
    talk = Conversation(tokenizer, row_prompt=[], row_text="", ends=ends)
    for said, drawn in TURNS:
        talk.say("user", said)
        talk.context()
        draw(talk, tokenizer.encode([drawn], special_tokens=False)[0] + ([] if cut else [ends[0]]))
    return tokenizer, talk


def draw(talk: Conversation, ids: list[int]) -> None:
    talk.drew(np.array(ids, np.int32), np.zeros(len(ids), np.float32), np.zeros(len(ids), np.int32))


def whole(tokenizer: TextTokenizer, talk: Conversation) -> list[int]:
    return tokenizer.encode([tokenizer.render(talk.messages, generation_prompt=False)], special_tokens=False)[0]


def ids_of(talk: Conversation) -> list[int]:
    return [*talk.prompt, *(int(token) for piece in talk.pieces for token in piece.token_ids)]


@pytest.mark.parametrize(("template", "tail"), [(CHATML, "\n"), (LLAMA, "")], ids=["chatml", "llama"])
@pytest.mark.parametrize("cut", [False, True], ids=["ended", "cut"])
def test_turns_are_the_tokens_of_the_whole_conversation(folder: Path, template: str, tail: str, cut: bool) -> None:
    """Up to what the template writes behind the last turn, which nobody has drawn or said. A turn that was cut gets the
    end it lacks, masked."""
    tokenizer, talk = held(folder, template, cut=cut)
    rendered, mine = whole(tokenizer, talk), ids_of(talk)
    assert mine == rendered[: len(mine)]
    assert tokenizer.decode(rendered[len(mine) :]) == ("<|im_end|>" if cut else "") + tail
    said = [tokenizer.decode(piece.token_ids.tolist()) for piece in talk.pieces if piece.turn < 0]
    assert len(said) == 2 and all(text.startswith("<|im_end|>") == cut for text in said)


def test_where_the_model_cuts_words_otherwise_its_tokens_stay(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHATML)
    tokenizer = TextTokenizer(folder)
    talk = Conversation(tokenizer, row_prompt=[], row_text="", ends=end_token_ids(folder))
    talk.say("user", "hi")
    talk.context()
    letters = [tokenizer.encode([letter], special_tokens=False)[0][0] for letter in "that"]
    draw(talk, [*letters, end_token_ids(folder)[0]])
    talk.say("user", "so?")
    context = talk.context().tolist()
    rendered = whole(tokenizer, talk)
    assert tokenizer.decode(context).startswith(tokenizer.decode(rendered)), "the same text"
    assert context[: len(rendered)] != rendered, "in other tokens: 'tha' is one of the vocabulary's"
    assert context[len(talk.prompt) : len(talk.prompt) + 4] == letters


def test_a_template_that_takes_thoughts_out_of_earlier_turns_changes_nothing_that_was_drawn(folder: Path) -> None:
    tokenizer, talk = held(folder, THOUGHTLESS)
    mine, rendered = tokenizer.decode(ids_of(talk)), tokenizer.decode(whole(tokenizer, talk))
    assert mine + "\n" == rendered.replace("i call", "thought</think>i call", 1) and "thought" not in rendered


def test_another_end_than_the_templates_is_kept_and_the_templates_follows(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHATML)
    tokenizer = TextTokenizer(folder)
    other = SPECIAL.index("<|endoftext|>")
    talk = Conversation(tokenizer, row_prompt=[], row_text="", ends=[other, *end_token_ids(folder)])
    talk.say("user", "hi")
    talk.context()
    draw(talk, [*tokenizer.encode(["ok"], special_tokens=False)[0], other])
    talk.say("user", "so?")
    assert "ok<|endoftext|><|im_end|>\n<|im_start|>user\nso?" in tokenizer.decode(talk.context().tolist())


def test_a_rows_own_prompt_is_taken_as_it_is_and_continued_as_it_began(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHATML)
    tokenizer = TextTokenizer(folder)
    system = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    for prompt, wanted in ((tokenizer.render(system), "<|im_end|>\n<|im_start|>tool\n7<|im_end|>\n"), ("hi", "ok7")):
        ids = tokenizer.encode([prompt], special_tokens=False)[0]
        talk = Conversation(tokenizer, row_prompt=ids, row_text="hi", ends=end_token_ids(folder))
        assert talk.context().tolist() == ids
        draw(talk, tokenizer.encode(["ok"], special_tokens=False)[0])
        talk.say("tool", "7")
        assert wanted in tokenizer.decode(talk.context().tolist())


def test_what_cannot_go_on_is_said(folder: Path) -> None:
    _, talk = held(folder, CHATML)
    with pytest.raises(ValueError, match="the last turn has ended, and nothing was said since"):
        talk.context()
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"
    )
    deaf = Conversation(TextTokenizer(folder), row_prompt=[], row_text="", ends=())
    deaf.say("user", "hi")
    deaf.context()
    draw(deaf, [10])
    deaf.say("user", "so?")
    with pytest.raises(ValueError, match="leaves the assistant's message out"):
        deaf.context()
