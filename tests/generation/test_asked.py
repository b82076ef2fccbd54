"""One rank that is asked by templates, stopped by texts, and draws from mixtures; in this process."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import LanguageModelConfig, ModelConfig, RolloutConfig
from rlhf_dist.parsers import Number
from rlhf_dist.prompt_template import Template
from rlhf_dist.wire import Call, OpResult, Pieces, WorkerContext
from tests.tiny import save_llama
from workers.asked import Asker, encode_rows
from workers.rollout import RolloutWorker

TEMPERATURE, SHARE = 0.7, 0.3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"actor": save_llama(folder / "actor"), "reference": save_llama(folder / "reference", seed=1)}


@pytest.fixture(scope="module")
def workers(folders: dict[str, Path]) -> dict[str, RolloutWorker]:
    """Two roles of one process."""
    made: dict[str, RolloutWorker] = {}
    for role, folder in folders.items():
        rollout = RolloutConfig(engine="transformers", max_prompt_tokens=64, max_response_tokens=16)
        config = LanguageModelConfig(model=ModelConfig(path=str(folder)), rollout=rollout)
        tokenizers = {name: str(path) for name, path in folders.items()}
        context = WorkerContext(role=role, rank=0, world=1, device="cpu", seed=0, peers=made, tokenizers=tokenizers)
        made[role] = RolloutWorker(context, config, max_staleness=None, loads=True)
    return made


def ask(worker: RolloutWorker, batch: Batch, pieces: Pieces | None = None, **settings: Any) -> OpResult:
    rows = np.arange(batch.num_rows)
    call = Call(num_rows=batch.num_rows, row_index=rows, step=0, node="asked", line="mine.py:1", seed=0, pieces=pieces)
    return worker.generate_sequences(batch, call, **settings)


def prompts(*texts: str, **columns: Column) -> Batch:
    ids = [np.array([4 + "0123456789+-*/=?.,:! abcdefghijklmnopqrstuvwxyz\n".index(c) for c in t]) for t in texts]
    own = {"prompt_ids": Column.ragged(ids, dtype=np.int32), "prompt": Column.strings(texts)}
    return Batch({**own, **columns}, len(texts))


def test_a_template_is_rendered_in_the_roles_own_words_and_the_answer_goes_on(
    workers: dict[str, RolloutWorker], folders: dict[str, Path]
) -> None:
    batch = prompts("1+1=", "9-4=", response_ids=Column.ragged([[6, 2], [9]], dtype=np.int32))
    template = Template("is {prompt} {response_ids}?", system="grade.", answer=" 4")
    result = ask(workers["actor"], batch, template=template, decode={"response_ids": "reference"}, parser=Number(), n=2)
    tokenizer = AutoTokenizer.from_pretrained(folders["actor"])
    asked = [tokenizer.decode(ids) for ids in result.columns["prompt_ids"].rows()]
    assert asked == ["grade.is 1+1= 2? 4"] * 2 + ["grade.is 9-4= 5? 4"] * 2
    assert result.columns["prompt"].rows() == ["is 1+1= 2?"] * 2 + ["is 9-4= 5?"] * 2
    assert result.columns["parsed"].values.tolist() == [1] * 4, "the answer's own beginning has a number"
    assert result.parent is not None and result.parent.tolist() == [0, 0, 1, 1]
    lengths = result.columns["prompt_ids"].lengths + result.columns["response_ids"].lengths
    assert result.tokens is not None and result.tokens.tolist() == lengths.tolist()


def test_no_rows_are_asked_nothing(workers: dict[str, RolloutWorker]) -> None:
    empty = prompts("1").take([])
    result = ask(workers["actor"], empty, template=Template("{prompt}"), parser=Number(), stop=("=",), prefix="prompt")
    assert result.columns.num_rows == 0 and {"score", "parsed", "prompt"} <= set(result.columns)


def test_a_prompt_that_does_not_fit_is_not_parsed_and_without_a_parser_an_error(
    workers: dict[str, RolloutWorker],
) -> None:
    batch, template = prompts("1+1=", "1" * 80), Template("{prompt}")
    result = ask(workers["actor"], batch, template=template, parser=Number(), n=2)
    assert result.columns["parsed"].values[2:].tolist() == [0, 0] and np.isnan(result.columns["score"].values[2:]).all()
    assert result.columns["response_ids"].lengths[2:].tolist() == [0, 0]
    assert result.metrics["prompts_too_long"].value == 1
    with pytest.raises(ValueError, match="80 tokens of row 1, and actor.rollout.max_prompt_tokens is 64; set actor"):
        ask(workers["actor"], batch, template=template)
    for settings in ({}, {"prefix": "prompt"}):  # no row is left out in silence where nobody marks it
        with pytest.raises(ValueError, match="prompts must have 1..64 tokens"):
            ask(workers["actor"], batch, **settings)


def test_a_row_is_drawn_alike_whatever_else_is_asked(workers: dict[str, RolloutWorker]) -> None:
    template = Template("{prompt}")
    both = ask(workers["actor"], prompts("1" * 80, "2+2="), template=template, parser=Number())
    plain = ask(workers["actor"], prompts("3+3=", "2+2="))
    assert both.columns["response_ids"].row(1).tolist() == plain.columns["response_ids"].row(1).tolist()


def test_a_stop_text_ends_a_response_as_finished_and_is_left_out_of_its_text(workers: dict[str, RolloutWorker]) -> None:
    batch = prompts("1+1=", "2+2=", "3+3=")
    free = ask(workers["actor"], batch, n=8)
    stops = (free.columns["response"].row(0)[3:5], free.columns["response"].row(9)[2])
    held = ask(workers["actor"], batch, n=8, stop=stops)
    ended = 0
    for row in range(24):
        before, after = free.columns["response"].row(row), held.columns["response"].row(row)
        at = min((before.find(stop) for stop in stops if stop in before), default=-1)
        assert after == (before[:at] if at >= 0 else before)
        ids = held.columns["response_ids"].row(row)
        assert free.columns["response_ids"].row(row)[: len(ids)].tolist() == ids.tolist(), "drawn as without a stop"
        assert held.columns["finished"].values[row] == (at >= 0 or free.columns["finished"].values[row])
        ended += at >= 0
    assert ended >= 2


def test_responses_of_a_piece_are_handed_over_as_the_reply_has_them(
    workers: dict[str, RolloutWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, of_row, handed = workers["actor"], np.array([0, 1, 1, 2]), dict[int, OpResult]()
    context = replace(worker.context, hand=lambda call, piece, result: handed.update({piece: result}))
    monkeypatch.setattr(worker, "context", context)
    batch = prompts("1+1=", "2+2=", "1" * 80, "3+3=")  # nothing is drawn for the third
    settings: dict[str, Any] = {"template": Template("{prompt}"), "parser": Number(), "n": 3}
    result = ask(worker, batch, Pieces(ticket="x", of_row=of_row), **settings)
    assert sorted(handed) == [0, 1, 2] and result.parent is not None and result.tokens is not None
    for piece, part in handed.items():
        rows = np.flatnonzero(of_row[result.parent] == piece)
        assert part.parent is not None and part.parent.tolist() == result.parent[rows].tolist()
        assert part.tokens is not None and part.tokens.tolist() == result.tokens[rows].tolist()
        whole = result.columns.take(rows)
        assert set(part.columns) == set(whole)
        for name in whole:
            for mine, theirs in zip(part.columns[name].rows(), whole[name].rows(), strict=True):
                np.testing.assert_array_equal(mine, theirs)
    assert set(ask(worker, batch, **settings).columns) == set(result.columns)


def test_a_prefix_of_text_or_ids_is_gone_on_from(workers: dict[str, RolloutWorker]) -> None:
    given = prompts("1+1=2", "2+2=4")
    whole = ask(workers["actor"], given)
    ids = Column.ragged([[6], [8]], dtype=np.int32)
    batch = prompts("1+1=", "2+2=", hint=Column.strings(["2", "4"]), ids=ids)
    for prefix in ("hint", "ids"):
        begun = ask(workers["actor"], batch, prefix=prefix)
        assert begun.columns["prompt_ids"].values.tolist() == given["prompt_ids"].values.tolist()
        assert begun.columns["response_ids"].values.tolist() == whole.columns["response_ids"].values.tolist()


def test_rows_are_encoded_under_another_prompt_and_with_another_response(folders: dict[str, Path]) -> None:
    context = WorkerContext(
        role="actor", rank=0, world=1, device="cpu", seed=0, tokenizers={"data": str(folders["actor"])}
    )
    asker, tokenizer = Asker(str(folders["actor"]), context), AutoTokenizer.from_pretrained(folders["actor"])
    batch = prompts(
        "1+1=", "9-4=", why=Column.strings(["add", "subtract these"]), n=Column.dense([2, 5], dtype="float32")
    )
    limits = RolloutConfig(max_prompt_tokens=12, max_response_tokens=6)
    template = Template("{prompt} {n}?", answer=" ok")
    encode = partial(encode_rows, asker, limits, template=template, decode={}, response=None, key="actor.rollout")
    columns = encode(batch).columns
    assert [tokenizer.decode(ids) for ids in columns["prompt_ids"].rows()] == ["1+1= 2? ok", "9-4= 5? ok"]
    assert set(columns) == {"prompt_ids", "prompt"}, "the responses stay"
    found = encode(batch, response="why")
    said = [tokenizer.decode(ids) for ids in found.columns["response_ids"].rows()]
    assert said == ["add" + tokenizer.eos_token, "subtra"], "an end of its own, and a cut where it is too long"
    assert found.columns["finished"].values.tolist() == [1, 0] and found.metrics["responses_cut"].value == 1
    assert found.columns["response_mask"].values.tolist() == [1] * 10
    assert encode(batch.take([]), response="why").columns.num_rows == 0
    with pytest.raises(ValueError, match="13 tokens of row 0, and actor.rollout.max_prompt_tokens is 12; set actor"):
        encode(batch, template=Template("{prompt}{prompt}{prompt}."))
    with pytest.raises(ValueError, match="response='n' must be a column of text, got float32"):
        encode(batch, response="n")


def log_probs(models: list[Any], share: float, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """[T, V] of pi^(1 - share) ref^share at TEMPERATURE, by whole forward passes."""
    tokens = torch.tensor(np.concatenate([prompt, response])[None].astype(np.int64))
    with torch.no_grad():
        mine, theirs = (model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in models)
    return (((1 - share) * mine + share * theirs) / TEMPERATURE).log_softmax(-1)


@pytest.mark.parametrize("greedy", [True, False])
def test_a_mixture_draws_token_by_token_from_the_normalised_product(
    workers: dict[str, RolloutWorker], folders: dict[str, Path], greedy: bool
) -> None:
    batch = prompts("1+1=", "12*3=")
    settings = {"temperature": TEMPERATURE, "mixture": ("reference", SHARE), "greedy": greedy, "n": 3}
    columns = ask(workers["actor"], batch, **settings).columns
    models = [AutoModelForCausalLM.from_pretrained(folders[role]) for role in ("actor", "reference")]
    for row in range(6):
        response = columns["response_ids"].row(row)
        expected = log_probs(models, SHARE, batch["prompt_ids"].row(row // 3), response)
        drawn = expected.gather(-1, torch.tensor(response.astype(np.int64))[:, None])[:, 0]
        np.testing.assert_allclose(columns["rollout_log_probs"].row(row), drawn, atol=1e-5)
        if greedy:
            assert expected.argmax(-1).tolist() == response.tolist()


def test_a_mixture_without_the_other_is_the_role_and_with_the_other_alone_the_other(
    workers: dict[str, RolloutWorker],
) -> None:
    batch = prompts("1+1=", "12*3=")
    for share, role in ((0.0, "actor"), (1.0, "reference")):
        mixed = ask(workers["actor"], batch, mixture=("reference", share)).columns
        assert (
            mixed["response_ids"].values.tolist() == ask(workers[role], batch).columns["response_ids"].values.tolist()
        )


def test_a_mixture_with_a_role_of_another_process_is_refused(workers: dict[str, RolloutWorker]) -> None:
    with pytest.raises(ValueError, match="'elsewhere', which does not generate in this process"):
        ask(workers["actor"], prompts("1"), mixture=("elsewhere", 0.5))
