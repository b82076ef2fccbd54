"""Data in the forms people have: read as it is, or refused by naming what was found."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_dist.config import PartConfig, SourceConfig
from rlhf_dist.data import PromptSource, check_source
from rlhf_dist.data.forms import common_beginning
from tests.data.test_sources import EOS, ids, jsonl, source

BOS = 1
USER, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "yes"), ("assistant", "no"))
)


def rows_of(tmp_path: Path, tokenizer: Path, raw: list[Any], **settings: Any) -> PromptSource:
    return source(SourceConfig(path=jsonl(tmp_path, raw), shuffle=False, **settings), tokenizer)


def refusal(tmp_path: Path, raw: list[Any], **settings: Any) -> str:
    with pytest.raises(ValueError) as caught:
        check_source(SourceConfig(path=jsonl(tmp_path, raw), **settings), "data.train")
    return str(caught.value)


def responses(batch: Any) -> list[list[int]]:
    return [row.tolist() for row in batch["response_ids"].rows()]


# --- preferences -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "q", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "q", "chosen": [USER, YES], "rejected": "no"},
        {"prompt": "q", "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
    ],
)
def test_all_forms_of_a_conversational_preference_are_the_same_pair(row: Any, tmp_path: Path, tokenizer: Path) -> None:
    batch = rows_of(tmp_path, tokenizer, [row], rows="preferences").emit(0, 1)
    assert batch["prompt"].rows() == ["q", "q"] and batch["label"].values.tolist() == [1, -1]
    prompt = [BOS, *ids("user: q"), EOS, *ids("\nassistant:")]
    assert [one.tolist() for one in batch["prompt_ids"].rows()] == [prompt, prompt]
    assert responses(batch) == [[*ids(" yes"), EOS], [*ids(" no"), EOS]]


def test_pairs_with_equal_sides_are_kept_and_counted(tmp_path: Path, tokenizer: Path) -> None:
    pairs = [("ab", "ab"), ("ab", "ac"), ("abc", "abd")]
    raw = [{"prompt": "q", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    given = SourceConfig(path=jsonl(tmp_path, raw), rows="preferences")
    assert source(given, tokenizer).counts.equal == 1 and source(given, tokenizer).size == 3
    assert source(given, tokenizer, response=2).counts.equal == 2  # cut to two tokens the last are the same, too


def test_a_prompt_inside_texts_is_what_they_share(tmp_path: Path, tokenizer: Path) -> None:
    row = {"chosen": "the sky is blue", "rejected": "the sky is green"}
    batch = rows_of(tmp_path, tokenizer, [row], rows="preferences").emit(0, 1)
    assert batch["prompt"].rows() == ["the sky is"] * 2
    assert responses(batch) == [[*ids(" blue"), EOS], [*ids(" green"), EOS]]


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("a b", "a c", "a"),
        ("say: yes", "say: yet", "say:"),
        ("a", "a b", "a"),
        ("abc", "abd", ""),
        ("same", "same", "same"),
        ("x\n\nA: I think", "x\n\nA: I am", "x\n\nA: I"),
    ],
)
def test_texts_are_cut_between_words(one: str, other: str, shared: str) -> None:
    assert common_beginning(one, other) == common_beginning(other, one) == shared


@pytest.mark.parametrize(
    ("row", "rows", "message"),
    [
        ({"chosen": "yes", "rejected": "no"}, "preferences", "line 1: there is no prompt, and 'chosen' and 'rejected'"),
        ({"chosen": [YES], "rejected": [NO]}, "preferences", "share no messages before the assistant's"),
        ({"prompt": "a", "completion": "b", "label": True}, "preferences", "an unpaired preference"),
        ({"prompt": "a", "completion": "b", "label": False}, "examples", "an unpaired preference"),
        ({"prompt": "a", "response": "b"}, "preferences", "has nothing under 'chosen'.* it has prompt, response"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "examples", "nothing under 'response' or 'completion'"),
        (
            {"question": "a", "answer": "b"},
            "prompts",
            "has nothing under 'prompt' or 'messages' .* question, answer; set prompt_key",
        ),
        ({"text": "a"}, "examples", "it has text; set prompt_key"),
        ({"prompt": [USER, YES]}, "prompts", "the prompt would hold its answer"),
        ({"messages": [USER]}, "examples", "has no answer of the assistant's"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "preferences", "'margin' must be a number"),
        ({"prompt": [USER], "chosen": [NO, USER], "rejected": [USER]}, "preferences", "must begin with the prompt or"),
    ],
)
def test_a_form_that_does_not_fit_names_what_was_found(row: Any, rows: str, message: str, tmp_path: Path) -> None:
    import re

    found = refusal(tmp_path, [row], rows=rows)
    assert re.search(message, found) and "data.jsonl, line 1" in found, found


# --- examples and prompts --------------------------------------------------------------------------------------
def test_prompt_and_completion_as_text_and_as_messages(tmp_path: Path, tokenizer: Path) -> None:
    text = {"prompt": "q", "completion": "yes"}
    batch = rows_of(tmp_path, tokenizer, [text], rows="examples").emit(0, 1)
    assert responses(batch) == [[*ids("yes"), EOS]] and batch["prompt_ids"].row(0).tolist() == ids("q")
    talk = {"prompt": [USER], "completion": [YES]}
    batch = rows_of(tmp_path, tokenizer, [talk], rows="examples").emit(0, 1)
    assert responses(batch) == [[*ids(" yes"), EOS]]


@pytest.mark.parametrize(
    "settings", [{}, {"prompt_key": "messages"}, {"prompt_key": "messages", "response_key": "messages"}]
)
def test_a_conversation_never_trains_on_a_prompt_that_holds_the_answer(
    settings: Any, tmp_path: Path, tokenizer: Path
) -> None:
    rows = [{"prompt": "a copy", "messages": [USER, YES]}]
    batch = rows_of(tmp_path, tokenizer, rows, rows="examples", **settings).emit(0, 1)
    assert batch["prompt"].rows() == ["q"] and responses(batch) == [[*ids(" yes"), EOS]]
    if settings:
        batch = rows_of(tmp_path, tokenizer, rows, rows="prompts", **settings).emit(0, 1)
        assert batch["prompt"].rows() == ["q"]


def test_verls_parquet_is_read_as_it_is(tmp_path: Path, tokenizer: Path) -> None:
    rows = [
        {
            "data_source": "math",
            "prompt": [{"role": "user", "content": f"{n}+{n}"}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * n)},
            "extra_info": {"index": n},
        }
        for n in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    for key in (None, "reward_model.ground_truth"):
        config = SourceConfig(path=str(tmp_path / "train.parquet"), answer_key=key, shuffle=False)
        batch = source(config, tokenizer).emit(0, 3)
        assert batch["answer"].rows() == ["0", "2", "4"] and batch["source"].rows() == ["math"] * 3
        assert json.loads(batch["fields"].row(1)) == {"extra_info": {"index": 1}}


def test_a_misspelt_key_is_named_with_what_is_there(tmp_path: Path) -> None:
    row = {"prompt": "a", "reward_model": {"ground_truth": "1", "style": "rule"}, "nothing": None}
    there = "which have prompt, reward_model.ground_truth, reward_model.style"
    assert refusal(tmp_path, [row], answer_key="reward_model.ground_thruth") == (
        f"data.train: answer_key='reward_model.ground_thruth' is in none of the first 1 rows ({tmp_path}/data.jsonl, "
        f"line 1, ...), {there}; did you mean 'reward_model.ground_truth'?"
    )
    assert "prompt_key='promt' is in none" in refusal(tmp_path, [row], prompt_key="promt")
    both = {"prompt": "a", "response": "b"}
    assert "did you mean 'response'?" in refusal(tmp_path, [both], rows="examples", response_key="respones")
    with pytest.raises(ValueError, match="answer_key='anser' .* did you mean 'answer'"):
        check_source(SourceConfig(generator="chain_sum", answer_key="anser"), "data.train")


def test_missing_answers_are_counted(tmp_path: Path, tokenizer: Path) -> None:
    rows = [
        {"prompt": "a", "answer": "1"},
        {"prompt": "b"},
        {"prompt": "c", "answer": None},
        {"prompt": "d", "answer": ""},
    ]
    made = rows_of(tmp_path, tokenizer, rows)
    assert made.counts.without_answer == 2
    config = SourceConfig(path=jsonl(tmp_path, rows))
    [line] = check_source(config, "data.train", tokenizer=tokenizer, max_prompt_tokens=9)
    assert "2 of 4 without an answer (answer or reward_model.ground_truth)" in line


def test_a_response_is_tokenised_where_it_stands(tmp_path: Path) -> None:
    """A tokenizer that puts a mark before every text puts none between a prompt and its response."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "▁": 2, "2": 3, "+": 4, "=": 5, "4": 6}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    rows = [{"prompt": "2+2=", "response": "4"}, {"prompt": "2+2=", "response": " 4"}]
    batch = rows_of(tmp_path, tmp_path, rows, rows="examples").emit(0, 2)
    assert batch["prompt_ids"].row(0).tolist() == [2, 3, 4, 3, 5]
    assert responses(batch) == [[6, 1], [2, 6, 1]]


def test_every_answer_begins_with_a_token_of_its_own(tmp_path: Path) -> None:
    """A vocabulary in which the template's colon and a space, or two digits, are one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {one: k for k, one in enumerate(["</s>", "u", "a", ":", "_", "1", "2", ":_", ":1", ":2"])}
    inner = Tokenizer(models.BPE(letters, [(":", "_"), (":", "1"), (":", "2")]))
    inner.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    fast.save_pretrained(tmp_path)
    talk = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "_21_", strict=True)]
    batch = rows_of(tmp_path, tmp_path, [{"messages": talk}], rows="examples").emit(0, 1)
    tokens = ["u", ":_", "</s>", "a", ":", "2", "</s>", "u", ":1", "</s>", "a", ":", "_", "</s>"]
    got = [*batch["prompt_ids"].row(0), *batch["response_ids"].row(0)]
    assert got == [letters[one] for one in tokens]
    assert batch["response_mask"].row(0).tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 1]


# --- files -----------------------------------------------------------------------------------------------------
def prompts(config: SourceConfig, tokenizer: Path) -> list[str]:
    return sorted(source(config, tokenizer).every()["prompt"].rows())


def test_folders_patterns_and_lists_of_files(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "more").mkdir()
    for name, prompt in (("a.jsonl", "1"), ("b.jsonl", "2"), ("more/c.jsonl", "3")):
        jsonl(tmp_path, [{"prompt": prompt}], name)
    with gzip.open(tmp_path / "more/d.jsonl.gz", "wt") as file:
        file.write('{"prompt": "4"}\n')
    (tmp_path / "more/e.json").write_text('[{"prompt": "5"},\n {"prompt": "6"}]')
    table = pa.table({"prompt": ["7"]})
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    for path, expected in {
        f"{tmp_path}/a.jsonl": "1",
        f"{tmp_path}/*.jsonl": "12",
        f"{tmp_path}/**/*.jsonl": "123",
        f"{tmp_path}/b.jsonl,{tmp_path}/more/d.jsonl.gz , {tmp_path}/b.jsonl": "24",
        f"{tmp_path}/more/e.json": "56",
        f"{tmp_path}/f.arrow": "7",
    }.items():
        assert prompts(SourceConfig(path=path), tokenizer) == list(expected), path
    with pytest.raises(ValueError, match="holds .json and .jsonl and .jsonl.gz files, perhaps the same rows twice"):
        prompts(SourceConfig(path=f"{tmp_path}/more"), tokenizer)
    with pytest.raises(ValueError, match=r"no data file '.*nothing-\*'"):
        prompts(SourceConfig(path=f"{tmp_path}/nothing-*"), tokenizer)


def test_a_folder_of_training_and_test_files_is_not_mixed(tmp_path: Path, tokenizer: Path) -> None:
    for name in ("train-0", "train-1", "test-0"):
        jsonl(tmp_path, [{"prompt": name}], f"{name}.jsonl")
    with pytest.raises(ValueError, match="training and test files"):
        prompts(SourceConfig(path=str(tmp_path)), tokenizer)
    assert prompts(SourceConfig(path=f"{tmp_path}/train*"), tokenizer) == ["train-0", "train-1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "a.jsonl, line 2 is not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b"', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-12], "a.jsonl.gz cannot be read"),
        ("a.json", b'[{"prompt": "a"}, 3]', "a.json, row 1 must be an object"),
        ("a.json", b'[{"prompt": "a"}, ', "a.json is not JSON"),
        ("a.arrow", b"nothing", "a.arrow cannot be read as an Arrow stream"),
    ],
)
def test_what_is_corrupt_is_named(name: str, content: bytes, message: str, tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prompts(SourceConfig(path=str(tmp_path / name)), tokenizer)


def test_a_parquet_file_cut_in_the_middle_is_named(tmp_path: Path, tokenizer: Path) -> None:
    pq.write_table(pa.table({"prompt": [str(n) * 20 for n in range(1500)]}), tmp_path / "a.parquet", row_group_size=300)
    whole = bytearray((tmp_path / "a.parquet").read_bytes())
    whole[len(whole) // 2 : len(whole) // 2 + 400] = bytes(400)
    (tmp_path / "a.parquet").write_bytes(bytes(whole))
    with pytest.raises(ValueError, match="a.parquet cannot be read as Parquet"):
        prompts(SourceConfig(path=str(tmp_path / "a.parquet")), tokenizer)


# --- mixtures --------------------------------------------------------------------------------------------------
def mixed(tmp_path: Path, **weights: float | None) -> SourceConfig:
    parts = {}
    for size, (name, weight) in enumerate(weights.items(), start=2):
        rows = [{"question": f"{name}{n}"} for n in range(size)]
        parts[name] = PartConfig(path=jsonl(tmp_path, rows, f"{name}.jsonl"), weight=weight)
    return SourceConfig(mix=parts, prompt_key="question")


def test_parts_without_weights_are_one_set_of_rows(tmp_path: Path, tokenizer: Path) -> None:
    made = source(mixed(tmp_path, a=None, b=None), tokenizer)
    assert made.size == 5
    for epoch in range(3):
        assert sorted(made.emit(epoch, 5)["prompt"].rows()) == ["a0", "a1", "b0", "b1", "b2"]
    assert set(made.emit(0, 5)["source"].rows()) == {"a", "b"}


def test_weights_give_every_step_its_shares_and_every_part_its_epochs(tmp_path: Path, tokenizer: Path) -> None:
    config = mixed(tmp_path, a=3, b=1)
    made, again = source(config, tokenizer), source(config, tokenizer)
    steps = [made.emit(step, 8)["prompt"].rows() for step in range(300)]
    assert steps[299] == again.emit(299, 8)["prompt"].rows()  # no state: a resumed run goes on as it was
    for drawn in steps:
        assert sum(one[0] == "a" for one in drawn) == 6
    flat = [one for drawn in steps for one in drawn]
    for name, size in (("a", 2), ("b", 3)):
        rows = [one for one in flat if one[0] == name]
        for begin in range(0, len(rows) - size, size):
            assert len(set(rows[begin : begin + size])) == size
    assert made.epochs(8 * 300) == {"epoch": 480, "epoch_a": 900, "epoch_b": 200}


def test_odd_weights_hold_over_a_cycle(tmp_path: Path, tokenizer: Path) -> None:
    from rlhf_dist.data.mixture import CYCLE, Mixture

    weights = np.array([0.1, 2.0, 3.3, 0.0123])
    mixture = Mixture(weights.tolist())
    part, before = mixture.at(np.arange(3 * CYCLE))
    for k, weight in enumerate(weights):
        assert abs((part == k).sum() - 3 * CYCLE * weight / weights.sum()) <= 3
        assert before[part == k].tolist() == list(range((part == k).sum()))
        assert mixture.drawn(CYCLE + 17)[k] == (part[: CYCLE + 17] == k).sum()
    with pytest.raises(ValueError, match="at least 1/4096"):
        Mixture([1, 1e-6])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mix": {"a": PartConfig(path="x", weight=1.0), "b": PartConfig(path="x")}}, "none for b"),
        ({"mix": {"a": PartConfig(path="x", weight=0.0)}}, "mix.a.weight must be above 0, got 0"),
        ({"mix": {"a": PartConfig()}}, "mix.a.set exactly one of path and generator"),
        ({"mix": {"a": PartConfig(path="gone")}}, "data.train: mix.a: no data file 'gone'"),
        ({"mix": {"a": PartConfig(path="x")}, "path": "y"}, "exactly one of path, generator and mix, got path='y'"),
    ],
)
def test_mixtures_that_cannot_be_are_named(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_source(SourceConfig(**config), "data.train")
