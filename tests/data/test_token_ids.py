"""Models that read one batch must mean the same by a token id."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_dist.checks import check_launch
from rlhf_dist.compose import compose
from rlhf_dist.data.token_ids import check_vocabulary
from rlhf_dist.typed import ConfigError
from tests.tiny import save_classifier, save_llama


def change(folder: Path, edit: str) -> None:
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    vocabulary = settings["model"]["vocab"]
    if edit == "order":  # "1" and "2" change places: same size, same tokens
        vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    if edit == "more":
        vocabulary["Ω"] = len(vocabulary)
    if edit == "less":
        del vocabulary["z"]
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize("role", ["reward", "reference", "critic"])
def test_a_model_with_another_vocabulary_is_refused_at_check(role: str, tmp_path: Path) -> None:
    actor = save_llama(tmp_path / "actor")
    other = save_classifier(tmp_path / "other") if role == "reward" else save_llama(tmp_path / "other")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "answer": "2"}\n' * 32)
    rule = [] if role == "reward" else ["reward.function=rlhf_dist.rewards:exact_match"]
    settings = [f"model.path={actor}", f"data.train.path={rows}", f"{role}.model.path={other}", "task=none", *rule]
    settings += ["actor.rollout.engine=transformers", f"output.root={tmp_path}"]
    check_launch(compose("ppo", settings))
    change(other, "more")
    check_launch(compose("ppo", settings))
    change(other, "order")
    with pytest.raises(
        ConfigError, match=rf"{role}.model.path=.*another vocabulary.*2 of \d+ tokens.* is '1' in the latter and '2'"
    ):
        check_launch(compose("ppo", settings))


def test_what_is_missing_or_broken_is_said(tmp_path: Path) -> None:
    actor, other = save_llama(tmp_path / "actor"), save_llama(tmp_path / "other")
    change(other, "less")
    with pytest.raises(
        ConfigError, match="1 of 52 tokens have another id, e.g. .* is 'z' in the latter and no token in"
    ):
        check_vocabulary(str(other), "reference.model.path", str(actor), "actor.model.path")
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no tokenizer"):
        check_vocabulary(str(other), "reference.model.path", str(actor), "actor.model.path")
    (other / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer.json, so nothing says"):
        check_vocabulary(str(other), "reference.model.path", str(actor), "actor.model.path")
