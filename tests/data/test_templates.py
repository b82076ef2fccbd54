"""Chat templates: rendered, and masked, as transformers does it; what they cannot render is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_dist.config import SourceConfig
from rlhf_dist.data import PromptSource, TextTokenizer, check_source, end_token_ids
from tests.data.test_sources import ids, jsonl, source
from tests.tiny import VOCABULARY, save_tokenizer

EOS, PAD = VOCABULARY["<eos>"], VOCABULARY["<pad>"]
BLOCKS = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
SHORT_BLOCKS = BLOCKS.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}")
NO_END = BLOCKS.replace("{{ eos_token }}", "")
TURNS = BLOCKS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
LOOKS_BACK = (  # as models that think do: only the last answer keeps its thoughts
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('=')[-1] }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and 2+2?"},
    {"role": "assistant", "content": "it is 4"},
]


def folder(tmp_path: Path, template: str | None) -> Path:
    where = tmp_path / "model"
    where.mkdir(exist_ok=True)
    save_tokenizer(where)
    (where / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (where / "chat_template.jinja").write_text(template)
    return where


def examples(tmp_path: Path, template: str, rows: list[Any], **settings: Any) -> PromptSource:
    config = SourceConfig(path=jsonl(tmp_path, rows), rows="examples", shuffle=False, **settings)
    return source(config, folder(tmp_path, template))


@pytest.mark.parametrize("template", [BLOCKS, SHORT_BLOCKS, NO_END, TURNS, LOOKS_BACK])
@pytest.mark.parametrize("chat", [TALK, TALK[:1], TALK[:3]])
def test_generation_blocks_render_as_in_transformers(tmp_path: Path, template: str, chat: Any) -> None:
    where = folder(tmp_path, template)
    ours, theirs = TextTokenizer(where), AutoTokenizer.from_pretrained(where)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(chat, generation_prompt=prompt) == expected


def test_masks_of_turns_are_those_of_transformers(tmp_path: Path) -> None:
    batch = examples(tmp_path, BLOCKS, [{"messages": TALK}]).emit(0, 1)
    theirs = AutoTokenizer.from_pretrained(folder(tmp_path, BLOCKS)).apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    prompt, response = batch["prompt_ids"].row(0).tolist(), batch["response_ids"].row(0).tolist()
    mask = [0] * len(prompt) + batch["response_mask"].row(0).tolist()
    last = len(mask)  # nothing behind the last answer is kept
    assert theirs["input_ids"][:last] == prompt + response and theirs["assistant_masks"][:last] == mask
    assert not any(theirs["assistant_masks"][last:])
    assert prompt == ids("user: 1+1?\nassistant: ")


@pytest.mark.parametrize("template", [SHORT_BLOCKS, TURNS])
def test_an_answer_is_learnt_with_its_end_whatever_the_block_holds(tmp_path: Path, template: str) -> None:
    batch = examples(tmp_path, template, [{"messages": TALK}]).emit(0, 1)
    response, mask = batch["response_ids"].row(0), batch["response_mask"].row(0)
    assert response.tolist() == [*ids("2"), EOS, *ids("\nuser: and 2+2?\nassistant: it is 4"), EOS]
    assert response[mask > 0].tolist() == [*ids("2"), EOS, *ids("it is 4"), EOS]


def test_a_template_without_an_end_gets_one_behind_the_last_answer(tmp_path: Path) -> None:
    batch = examples(tmp_path, NO_END, [{"messages": TALK}]).emit(0, 1)
    response, mask = batch["response_ids"].row(0), batch["response_mask"].row(0)
    assert response[mask > 0].tolist() == [*ids("2"), *ids("it is 4"), EOS] and response[-1] == EOS


def test_turns_that_change_once_others_follow_are_refused_unless_the_last_is_asked_for(tmp_path: Path) -> None:
    talk = [{**one, "content": f"3={one['content']}"} for one in TALK]
    rows = [{"messages": TALK[:2]}, {"messages": talk}]
    with pytest.raises(ValueError, match=r"data.jsonl, line 2: the chat template of .*\(turns=last\)"):
        examples(tmp_path, LOOKS_BACK, rows)
    batch = examples(tmp_path, LOOKS_BACK, rows, turns="last").emit(0, 2)
    assert batch["response_ids"].row(1).tolist() == [*ids("3=it is 4"), EOS]
    assert batch["prompt_ids"].row(1).tolist()[-len("assistant: ") :] == ids("assistant: ")
    assert batch["response_mask"].values.all()


def test_a_prompts_own_answers_are_not_learnt(tmp_path: Path) -> None:
    rows = [{"prompt": TALK[:3], "completion": TALK[3:]}]
    for template in (BLOCKS, TURNS):
        batch = examples(tmp_path, template, rows).emit(0, 1)
        assert batch["response_ids"].row(0).tolist() == [*ids("it is 4"), EOS]
        assert batch["response_mask"].row(0).all()
        assert batch["prompt_ids"].row(0).tolist()[-len("assistant: ") :] == ids("assistant: ")


def test_the_template_ends_a_turn_once(tmp_path: Path) -> None:
    """The source's own end is not put behind the template's."""
    batch = examples(tmp_path, TURNS, [{"prompt": "1+1?", "response": "2"}], chat=True).emit(0, 1)
    assert batch["response_ids"].row(0).tolist() == [*ids("2"), EOS]


# --- what messages may hold ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "line 2: 'prompt', message 0 has no text as its content, got 'None'"),
        (3, "line 2: 'prompt', message 0 has no text as its content, got '3'"),
        ([{"type": "image", "url": "x"}], "line 2: 'prompt', message 0 has a part of type image; only text"),
    ],
)
def test_content_that_a_template_would_print_as_it_stands_is_refused(
    tmp_path: Path, content: Any, message: str
) -> None:
    rows = [{"prompt": [{"role": "user", "content": one}]} for one in ("a", content)]
    template = "{% for m in messages %}{{ m.role ~ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=message) as caught:
        check_source(SourceConfig(path=jsonl(tmp_path, rows)), "data.train", tokenizer=folder(tmp_path, template))
    assert str(caught.value).startswith(f"data.train: {tmp_path}/data.jsonl, line 2")


def test_parts_of_text_and_null_fields_are_read(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]
    row = {"prompt": [{"role": "user", "content": parts, "name": None, "tool_calls": None}]}
    template = "{% for m in messages %}{{ m.content }}{% if 'tool_calls' in m %}called{% endif %}{% endfor %}"
    batch = source(SourceConfig(path=jsonl(tmp_path, [row])), folder(tmp_path, template)).emit(0, 1)
    assert batch["prompt_ids"].row(0).tolist() == ids("1+1") and batch["prompt"].rows() == ["1+1"]


def test_conversations_of_from_and_value_are_messages(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
    batch = examples(tmp_path, BLOCKS, [{"conversations": talk}]).emit(0, 1)
    assert batch["prompt"].rows() == ["1+1?"] and batch["response_ids"].row(0).tolist() == [*ids("2"), EOS]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no talk of that') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[3].content }}",
        "{% for m in messages %}",
    ],
)
def test_a_template_that_fails_names_the_row(tmp_path: Path, template: str) -> None:
    config = SourceConfig(path=jsonl(tmp_path, [{"prompt": TALK[:1]}]))
    with pytest.raises(ValueError, match=r"data.train: .*data.jsonl, line 1: the chat template of .* refuses"):
        check_source(config, "data.train", tokenizer=folder(tmp_path, template))


def test_arguments_and_tools_reach_the_template(tmp_path: Path) -> None:
    row = {"prompt": TALK[:1], "tools": [{"name": "add", "strict": None}]}
    template = "{{ messages[0].content }}{% if brief %} brief{% endif %}{{ tools | tojson | lower }}"
    config = SourceConfig(path=jsonl(tmp_path, [row]), template_args={"brief": True})
    text = source(config, folder(tmp_path, template)).tokenizer.decode(
        source(config, folder(tmp_path, template)).emit(0, 1)["prompt_ids"].row(0).tolist()
    )
    assert text.startswith("1+1? brief") and "strict" not in text and "add" in text


# --- what a tokenizer folder holds -----------------------------------------------------------------------------
def test_truncation_and_padding_left_in_the_file_are_ignored(tmp_path: Path) -> None:
    where = folder(tmp_path, None)
    settings = json.loads((where / "tokenizer.json").read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": PAD,
        "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    (where / "tokenizer.json").write_text(json.dumps(settings))
    texts = ["12", "1+2+3+4+5+6+7+8+9="]
    theirs = AutoTokenizer.from_pretrained(where)
    assert TextTokenizer(where).encode(texts, special_tokens=True) == [theirs(text)["input_ids"] for text in texts]
    batch = source(SourceConfig(path=jsonl(tmp_path, [{"prompt": text} for text in texts]), shuffle=False), where)
    assert batch.emit(0, 2)["prompt_ids"].lengths.tolist() == [2, 18]


def test_all_files_that_name_an_end_of_text_count(tmp_path: Path) -> None:
    where = folder(tmp_path, "{% for m in messages %}{{ m.content }}<pad>{% endfor %}")
    assert end_token_ids(where) == [EOS, PAD]  # the tokenizer's, and what the template ends a turn with
    (where / "config.json").write_text(json.dumps({"eos_token_id": 40}))
    (where / "generation_config.json").write_text(json.dumps({"eos_token_id": [41, 42]}))
    assert end_token_ids(where) == [41, 42, 40, EOS, PAD]
    (where / "chat_template.jinja").unlink()
    for name in ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"):
        (where / name).unlink(missing_ok=True)
    assert end_token_ids(where) == [41, 42, 40]
    shutil.rmtree(where)
    where.mkdir()
    assert end_token_ids(where) == []


@pytest.mark.parametrize("chat", [True, False])
def test_what_a_source_appends_is_what_generation_stops_at(tmp_path: Path, chat: bool) -> None:
    """The three files disagree: config.json says 40, generation_config.json 41, the tokenizer <eos>."""
    where = folder(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    (where / "config.json").write_text(json.dumps({"eos_token_id": 40}))
    (where / "generation_config.json").write_text(json.dumps({"eos_token_id": 41}))
    rows = [{"prompt": "a", "response": "b"}]
    made = source(SourceConfig(path=jsonl(tmp_path, rows), rows="examples", chat=chat), where)
    assert made.emit(0, 1)["response_ids"].row(0)[-1] in end_token_ids(where)


def test_without_any_end_of_text_examples_are_refused(tmp_path: Path) -> None:
    where = folder(tmp_path, None)
    settings = json.loads((where / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (where / "tokenizer_config.json").write_text(json.dumps(settings))
    (where / "special_tokens_map.json").unlink(missing_ok=True)
    config = SourceConfig(path=jsonl(tmp_path, [{"prompt": "a", "response": "b"}]), rows="examples")
    with pytest.raises(ValueError, match="names an end of text"):
        source(config, where)
