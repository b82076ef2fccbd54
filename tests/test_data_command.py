"""What people see of their data and models before a run: `rlhf-dist data`, the lines of `check`, epochs as steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from controller.commands.cli import main
from rlhf_dist.checks import check_launch
from rlhf_dist.compose import compose
from rlhf_dist.data import training_source, with_steps_of_epochs
from rlhf_dist.weights_files import StoredWeights, export_dtype, stored_weights
from tests.data.test_sources import jsonl
from tests.tiny import save_llama

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALK = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(tmp_path_factory.mktemp("model"), hidden=128)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def half(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with bfloat16 weights."""
    folder = tmp_path_factory.mktemp("half")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text((model / name).read_text())
    return folder


def settings(model: Path, tmp_path: Path, rows: list[object]) -> list[str]:
    path = jsonl(tmp_path, rows)
    return [f"model.path={model}", f"data.train.path={path}", "data.prompts_per_step=2", f"output.root={tmp_path}"]


def test_samples_show_what_is_learnt(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "sft", "--rows", "1", *settings(model, tmp_path, [{"messages": TALK}])]) == 0
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert shown[:6] == [
        "rows         1 of 1 are used",
        "epoch        1 steps of 2 (data.prompts_per_step)",
        "prompts      22 to 22 (mean 22.0) tokens, at most 256",
        "responses    26 to 26 (mean 26.0) tokens, at most 256",
        "trained      4 of 26 response tokens",
        "end of text  <eos> (2)",
    ]
    assert shown[7] == f"{tmp_path}/data.jsonl, line 1, 22 prompt, 4 trained, 22 context, ends with <eos> (2)"
    assert shown[8:] == [
        "prompt    user: 1+1?<eos>assistant:",
        "trained   2<eos>",
        "context   user: 2+2?<eos>assistant:",
        "trained   4<eos>",
    ]


def test_colours_are_for_terminals_that_want_them(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["data", "sft", "--rows", "1", *settings(model, tmp_path, [{"messages": TALK}])]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(command)
    assert "\x1b[1;32m2<eos>\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    main(command)
    assert "32m" not in capsys.readouterr().out


def test_pairs_prompts_and_cuts_are_shown(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "1", "chosen": "234567", "rejected": "3", "answer": "x\x1by"}]
    given = settings(model, tmp_path, rows)
    main(["data", "dpo", "--rows", "1", "data.max_response_tokens=3", *given])
    shown = capsys.readouterr().out
    assert "responses    2 to 3 (mean 2.5) tokens, at most 3; 1 cut" in shown
    assert "line 1, chosen, 1 prompt, 3 trained, cut: no end of text" in shown
    assert "line 1, rejected, 1 prompt, 2 trained, ends with <eos> (2)" in shown
    main(["data", "grpo", "task=none", "--rows", "1", "reward.function=rlhf_dist.rewards:exact_match", *given])
    shown = capsys.readouterr().out
    assert "answers      in every row" in shown and "answer    x\\x1by" in shown


def test_data_that_cannot_be_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = settings(model, tmp_path, [{"messages": TALK}, {"messages": TALK[:1]}])
    assert main(["data", "sft", *given]) == 2
    assert f"error: data.train: {tmp_path}/data.jsonl, line 2: 'messages' has no answer" in capsys.readouterr().err
    assert main(["data", "sft", "--heldout", *given]) == 2
    assert "data.heldout is not set" in capsys.readouterr().err
    assert main(["data", "sft", "--rows", "-1", *given]) == 2
    assert main(["check", "sft", *given]) == 2
    assert "line 2: 'messages' has no answer" in capsys.readouterr().err


def test_check_says_which_data_and_dtypes(half: Path, tmp_path: Path) -> None:
    given = settings(half, tmp_path, [{"prompt": TALK[:1], "answer": "2"}])
    own = ["task=none", "reward.function=rlhf_dist.rewards:exact_match", "model.dtype=float32"]  # auto: the processor's
    launch = compose("grpo", [*own, *given])
    lines = check_launch(launch)
    assert any("data.jsonl (chat messages)" in one and "prompts 22 to 22 tokens of 256" in one for one in lines)
    [actor] = [one for one in lines if one.startswith("model     actor")]
    assert "K parameters, bfloat16 weights), computes in float32, generates in float32" in actor
    assert actor.endswith("trains float32 master weights, exported as bfloat16")
    [told] = [one for one in check_launch(compose("sft", [
        "actor.engine.export_dtype=float32", *settings(half, tmp_path, [{"messages": TALK}])
    ])) if one.startswith("model     actor")]  # fmt: skip
    assert told.endswith("exported as float32")


def test_the_dtype_of_weights_is_read_from_their_files(model: Path, half: Path, tmp_path: Path) -> None:
    count = sum(one.numel() for one in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert stored_weights(model) == StoredWeights("float32", count)
    assert stored_weights(half) == StoredWeights("bfloat16", count)
    assert stored_weights(tmp_path) == StoredWeights(None, None)
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    assert export_dtype(tmp_path, None, "float32") == "bfloat16"
    assert export_dtype(half, "float32", "bfloat16") == "float32"
    whole = (half / "model.safetensors").read_bytes()
    for content in (whole[:-9], whole[:100], b"", b"\xff" * 50):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors is cut short or no safetensors file"):
            stored_weights(tmp_path)


def test_epochs_set_the_steps_by_the_rows_that_are_used(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "1" * length, "response": "2"} for length in (1, 2, 3, 9)]
    given = [*settings(model, tmp_path, rows), "data.max_prompt_tokens=8"]
    launch = with_steps_of_epochs(compose("sft", ["data.epochs=3", *given]))
    assert launch.run.steps == 5 and with_steps_of_epochs(launch) is launch
    assert "epochs    3 of 3 rows = 5 steps; 1 rows of the next pass fill the last step" in check_launch(launch)
    drawn = [one for step in range(5) for one in training_source(launch).emit(step, 2)["prompt"].rows()]
    assert all(drawn[:9].count(prompt) == 3 for prompt in ("1", "11", "111"))
    plain = compose("sft", given)
    assert with_steps_of_epochs(plain) is plain and plain.run.steps == 100
