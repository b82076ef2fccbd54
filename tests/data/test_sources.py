"""Sources: what they emit, that it depends on the step alone, and what they say about faulty input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_dist.config import SourceConfig
from rlhf_dist.data import PromptSource, check_source, emitted_columns
from rlhf_dist.data.read import FIRST
from rlhf_dist.rewards import reasoning_gym_solved
from rlhf_dist.schema import COLUMNS
from tests.tiny import VOCABULARY

EOS = VOCABULARY["<eos>"]


def ids(text: str) -> list[int]:
    return [VOCABULARY[character] for character in text]


def jsonl(folder: Path, rows: list[Any], name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(
    config: SourceConfig, tokenizer: Path, seed: int = 0, prompt: int = 100, response: int = 100
) -> PromptSource:
    return PromptSource(config, tokenizer=tokenizer, seed=seed, max_prompt_tokens=prompt, max_response_tokens=response)


def sums(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(count)]


def test_prompts_from_jsonl(tmp_path: Path, tokenizer: Path) -> None:
    config = SourceConfig(path=jsonl(tmp_path, sums(3)), shuffle=False)
    batch = source(config, tokenizer).emit(1, 2)
    assert set(batch) == set(emitted_columns("prompts"))
    assert batch["group_id"].values.tolist() == [2, 3]
    assert batch["prompt"].rows() == ["2+2=", "0+0="]
    assert batch["answer"].rows() == ["4", "0"]
    assert batch["source"].rows() == ["data", "data"]
    assert batch["prompt_ids"].row(0).tolist() == ids("2+2=")


@pytest.mark.parametrize("rows", ["prompts", "examples", "preferences"])
def test_emitted_columns_have_the_dtypes_of_the_schema(rows: str, tmp_path: Path, tokenizer: Path) -> None:
    row = {"prompt": "1", "response": "2", "chosen": "3", "rejected": "4", "margin": 0.5}
    batch = source(SourceConfig(path=jsonl(tmp_path, [row]), rows=rows), tokenizer).emit(0, 1)
    assert set(batch) == set(emitted_columns(rows))
    for name, column in batch.items():
        assert ("text" if column.text else str(column.values.dtype)) == COLUMNS[name].dtype, name


def test_prompts_from_parquet_with_their_own_field_names_and_messages(tmp_path: Path, tokenizer: Path) -> None:
    messages = [
        [{"role": "user", "content": "1+1"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    ]
    pq.write_table(pa.table({"question": messages, "truth": [2, 3]}), tmp_path / "chat.parquet")
    config = SourceConfig(
        path=str(tmp_path / "chat.parquet"), prompt_key="question", answer_key="truth", system="short", shuffle=False
    )
    batch = source(config, tokenizer).emit(0, 2)
    rendered = ids("system: short") + [EOS] + ids("\nuser: 1+1") + [EOS] + ids("\nassistant:")
    assert batch["prompt_ids"].row(0).tolist() == [VOCABULARY["<bos>"], *rendered]
    assert batch["prompt"].rows() == ["system: short\nuser: 1+1", "system: short\nuser: a\nuser: b"]
    assert batch["answer"].rows() == ["2", "3"]


def test_text_prompts_become_a_user_message_where_chat_is_asked_for(tmp_path: Path, tokenizer: Path) -> None:
    config = SourceConfig(path=jsonl(tmp_path, [{"prompt": "hi"}]), chat=True)
    batch = source(config, tokenizer).emit(0, 1)
    assert batch["prompt"].rows() == ["hi"] and batch["answer"].rows() == [""]
    assert batch["prompt_ids"].row(0).tolist()[1:10] == ids("user: hi") + [EOS]


def test_examples_end_with_eos_and_long_ones_are_cut_and_counted(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"prompt": "a", "response": "bc"}, {"prompt": "a", "response": "bcdef"}, {"prompt": "a", "response": ""}]
    made = source(SourceConfig(path=jsonl(tmp_path, rows), rows="examples", shuffle=False), tokenizer, response=3)
    batch = made.emit(0, 3)
    assert [row.tolist() for row in batch["response_ids"].rows()] == [[*ids("bc"), EOS], ids("bcd"), [EOS]]
    assert batch["response_mask"].lengths.tolist() == [3, 3, 1] and batch["response_mask"].values.all()
    assert made.counts.cut == 1


def test_preferences_are_two_rows_of_one_group(tmp_path: Path, tokenizer: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "yes", "rejected": "no", "margin": 2},
        {"prompt": "q", "chosen": "ok", "rejected": "x"},
    ]
    made = source(SourceConfig(path=jsonl(tmp_path, rows), rows="preferences", shuffle=False), tokenizer)
    batch = made.emit(3, 2)
    assert made.size == 2
    assert batch["group_id"].values.tolist() == [6, 6, 7, 7]
    assert batch["label"].values.tolist() == [1, -1, 1, -1]
    assert batch["margin"].values.tolist() == [2, 2, 0, 0]
    assert batch["prompt"].rows() == ["p", "p", "q", "q"]
    texts = ["yes", "no", "ok", "x"]
    assert [row.tolist() for row in batch["response_ids"].rows()] == [[*ids(text), EOS] for text in texts]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 7), rows=st.integers(1, 9), steps=st.integers(1, 6), seed=st.integers(0, 99))
def test_every_epoch_holds_every_row_once_and_a_step_depends_on_its_number_alone(
    size: int, rows: int, steps: int, seed: int, tmp_path: Path, tokenizer: Path
) -> None:
    config = SourceConfig(path=jsonl(tmp_path, sums(size)))
    first, second = source(config, tokenizer, seed), source(config, tokenizer, seed)
    batches = [first.emit(step, rows) for step in range(steps)]
    backwards = [second.emit(step, rows) for step in reversed(range(steps))][::-1]
    prompts = [prompt for batch in batches for prompt in batch["prompt"].rows()]
    assert prompts == [prompt for batch in backwards for prompt in batch["prompt"].rows()]
    assert np.concatenate([batch["group_id"].values for batch in batches]).tolist() == list(range(rows * steps))
    for begin in range(0, len(prompts) - size + 1, size):
        assert len(set(prompts[begin : begin + size])) == size


def test_the_order_differs_between_epochs_and_seeds_and_not_without_shuffle(tmp_path: Path, tokenizer: Path) -> None:
    path = jsonl(tmp_path, sums(30))
    mixed = source(SourceConfig(path=path), tokenizer, seed=1)
    epochs = [tuple(mixed.emit(epoch, 30)["prompt"].rows()) for epoch in range(2)]
    other = tuple(source(SourceConfig(path=path), tokenizer, seed=2).emit(0, 30)["prompt"].rows())
    assert len({*epochs, other}) == 3
    plain = source(SourceConfig(path=path, shuffle=False), tokenizer)
    assert (
        plain.emit(0, 30)["prompt"].rows() == plain.emit(1, 30)["prompt"].rows() == [row["prompt"] for row in sums(30)]
    )


def test_prompts_that_are_too_long_are_dropped_and_counted(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"prompt": "a" * length} for length in (3, 5, 4, 9)]
    made = source(SourceConfig(path=jsonl(tmp_path, rows), shuffle=False), tokenizer, prompt=4)
    assert (made.size, made.counts.too_long) == (2, 2)
    assert made.emit(0, 4)["prompt"].rows() == ["aaa", "aaaa", "aaa", "aaaa"]
    with pytest.raises(ValueError, match=r"every one of 4 prompts .* max_prompt_tokens = 2 \(the shortest has 3"):
        source(SourceConfig(path=jsonl(tmp_path, rows)), tokenizer, prompt=2)


def test_reasoning_gym_prompts_carry_what_their_verifier_needs(tokenizer: Path) -> None:
    config = SourceConfig(
        generator="chain_sum", generator_args={"min_terms": 2, "max_terms": 2, "max_digits": 1}, size=5
    )
    batch = source(config, tokenizer, seed=4).emit(0, 5)
    assert batch["source"].rows() == ["chain_sum"] * 5
    for row in range(5):
        answer = batch["answer"].row(row)
        truth = json.loads(answer)["entry"]["answer"]
        assert reasoning_gym_solved(batch["prompt"].row(row), f"It is {truth}.", answer) == 1.0
    again, other = (source(config, tokenizer, seed=seed).emit(0, 5)["prompt"].rows() for seed in (4, 5))
    assert again == batch["prompt"].rows() != other


def test_reasoning_gym_gives_examples_too(tokenizer: Path) -> None:
    config = SourceConfig(generator="spell_backward", generator_args={"max_word_len": 4}, size=2, rows="examples")
    batch = source(config, tokenizer).emit(0, 2)
    assert batch["response_ids"].lengths.min() > 1


def test_a_users_generator(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def rows(index, start=0):\n    return {'prompt': f'{start + index}?', 'answer': 'x'}\n")
    config = SourceConfig(generator=f"{file}:rows", generator_args={"start": 5}, size=2, shuffle=False)
    batch = source(config, tokenizer).emit(0, 3)
    assert batch["prompt"].rows() == ["5?", "6?", "5?"]
    assert batch["source"].rows() == ["rows"] * 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "exactly one of path, generator and mix, got none"),
        ({"path": "a", "generator": "b"}, "exactly one of path, generator and mix, got path='a', generator='b'"),
        ({"path": "missing.jsonl"}, "no data file 'missing.jsonl'"),
        ({"path": "{folder}/data.csv"}, r"a data file is one of .parquet, .jsonl"),
        ({"path": "{folder}/bad.parquet"}, "cannot be read as Parquet"),
        ({"path": "{folder}/bad.jsonl"}, r"bad.jsonl, line 1 is not JSON"),
        ({"path": "{folder}/empty.jsonl"}, "has no rows"),
        ({"path": "{folder}/list.jsonl"}, "list.jsonl, line 1 must be an object"),
        ({"path": "{folder}/good.jsonl", "rows": "prompt"}, "rows must be one of .*; did you mean 'prompts'"),
        ({"path": "{folder}/good.jsonl", "prompt_key": "promt"}, "'promt'.*did you mean 'prompt'"),
        (
            {"path": "{folder}/good.jsonl", "rows": "examples"},
            "line 1 has nothing under 'response' or 'completion', .*it has prompt; set response_key",
        ),
        ({"generator": "chain_sums"}, "no reasoning-gym data set 'chain_sums'; did you mean 'chain_sum'"),
        ({"generator": "chain_sum", "generator_args": {"digits": 3}}, "refuses generator_args .*digits"),
        ({"generator": "chain_sum", "generator_args": {"min_terms": -1}}, "refuses generator_args"),
        ({"generator": "chain_sum", "size": 0}, "size must be >= 1"),
        ({"generator": "{folder}/mine.py:row"}, "did you mean 'rows'"),
        ({"generator": "{folder}/mine.py:rows", "generator_args": {"x": 1}}, "must be a function .index"),
        ({"generator": "{folder}/mine.py:late"}, r"mine.py:late, row 2: the generator raised KeyError: 'x'"),
        ({"generator": "{folder}/broken.py:rows"}, "broken.py:rows': ZeroDivisionError"),
    ],
)
def test_the_driver_names_what_is_wrong(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name, text in {
        "data.csv": "x",
        "bad.parquet": "x",
        "bad.jsonl": "{\n",
        "empty.jsonl": "\n",
        "list.jsonl": "[1]\n",
        "good.jsonl": '{"prompt": "a"}\n',
        "mine.py": "def rows(index): return {'prompt': 'a'}\ndef late(index): return rows(0) if index < 2 else {}['x']",
        "broken.py": "1 / 0",
    }.items():
        (tmp_path / name).write_text(text)
    filled = {key: value.format(folder=tmp_path) if isinstance(value, str) else value for key, value in config.items()}
    with pytest.raises(ValueError, match=message) as caught:
        check_source(SourceConfig(**filled), "data.train")
    assert str(caught.value).startswith("data.train: ")


def test_faults_behind_the_first_row_are_named_by_the_source(tmp_path: Path, tokenizer: Path) -> None:
    path, good = tmp_path / "data.jsonl", '{"prompt": "a"}\n' * FIRST
    path.write_text(f'{good}\n{{"prompt": \n')
    check_source(SourceConfig(path=str(path)), "data.train")
    with pytest.raises(ValueError, match=f"data.jsonl, line {FIRST + 2} is not JSON"):
        source(SourceConfig(path=str(path)), tokenizer)
    for row, message in (
        ({"prompt": ""}, "line 2: the prompt is empty"),
        ({"answer": "a"}, "line 2: it has nothing under 'prompt'"),
        ({"prompt": 3}, "line 2: 'prompt' must be text or a list of messages, got '3'"),
        ({"prompt": [{"text": "a"}]}, "line 2: 'prompt', message 0 must have a role and content"),
    ):
        with pytest.raises(ValueError, match=message):
            source(SourceConfig(path=jsonl(tmp_path, [{"prompt": "a"}, row])), tokenizer)


def test_a_rendered_chat_brings_its_own_special_tokens_and_plain_text_gets_the_tokenizers(tmp_path: Path) -> None:
    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(tmp_path)
    path = jsonl(tmp_path, [{"prompt": "a a"}])
    for chat in (True, False):
        batch = source(SourceConfig(path=path, chat=chat), tmp_path).emit(0, 1)
        assert batch["prompt_ids"].row(0).tolist() == [0, 2, 2]  # one <s>, never two


@pytest.mark.parametrize("extra", [{"chat": True}, {"system": "be short"}, {}])
def test_chat_data_needs_a_chat_template(extra: dict[str, Any], tmp_path: Path, plain_tokenizer: Path) -> None:
    prompt = "a" if extra else [{"role": "user", "content": "a"}]
    config = SourceConfig(path=jsonl(tmp_path, [{"prompt": prompt}]), **extra)
    for run in (
        lambda: check_source(config, "data.train", tokenizer=plain_tokenizer),
        lambda: source(config, plain_tokenizer),
    ):
        with pytest.raises(ValueError, match="has no chat template"):
            run()


def test_chat_false_refuses_messages(tmp_path: Path, tokenizer: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ValueError, match="chat is false"):
        source(SourceConfig(path=path, chat=False), tokenizer)


def test_impossible_steps_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    made = source(SourceConfig(path=jsonl(tmp_path, sums(1))), tokenizer)
    for step, rows in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="rows >= 1 for a step >= 0"):
            made.emit(step, rows)
