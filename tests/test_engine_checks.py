"""Engine settings that cannot be, found before anything starts: the key, the value, and what would do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.test_checks import failure, plan
from tests.tiny import save_llama

FOUR = "placement.pools.main.slots=4"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), hidden=128)  # 4 heads, 2 key-value heads


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["actor.engine=megatron"], "actor.engine.name must be one of fsdp, deepspeed, got 'megatron'"),
        (["actor.engine.sequence_parallel=0"], "actor.engine.sequence_parallel must be at least 1, got 0"),
        ([FOUR, "actor.engine.sequence_parallel=4"], "must divide the 2 key-value heads"),
        ([FOUR, "actor.engine.tensor_parallel=4"], "it may be 1, 2"),
        (["actor.engine.sequence_parallel=2", "actor.engine.tensor_parallel=2"], "must divide the 2 slots"),
        (["critic.engine.replicas=3"], "critic.engine: sequence_parallel * tensor_parallel * replicas = 1 * 1 * 3"),
        (["actor.engine=deepspeed", "actor.engine.zero_stage=4"], "actor.engine.zero_stage must be 1, 2 or 3, got 4"),
        (["actor.engine.zero_stage=1"], "must be 2 or 3, got 1; 1 needs actor.engine=deepspeed"),
        (["actor.engine=deepspeed", "actor.engine.zero_stage=2", "actor.engine.offload=all"], "set zero_stage=3 or"),
        (["actor.engine.offload=optimizer"], "needs actor.engine=deepspeed; with fsdp it is `none` or `all`"),
        (["actor.engine=deepspeed", "actor.engine.sequence_parallel=2"], "sequence_parallel=2 needs actor.engine=fsdp"),
        (["actor.engine=deepspeed", "actor.engine.compile=true"], "compile=True needs actor.engine=fsdp"),
        (["actor.engine=deepspeed", "+actor.engine.lora.rank=8"], "actor.engine.lora needs actor.engine=fsdp"),
        (["+actor.engine.lora.rank=0"], "actor.engine.lora.rank must be at least 1, got 0"),
        (["+actor.engine.lora.rank=8", "actor.engine.tensor_parallel=2"], "do not go together; set one"),
        (["actor.optimizer.nonfinite=ignore"], "actor.optimizer.nonfinite must be one of stop, skip, got 'ignore'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_engine_settings_that_cannot_be_are_named(model: Path, overrides: list[str], expected: str) -> None:
    assert expected in failure("ppo", model, *overrides)


@pytest.mark.parametrize("name", ["sequence_parallel", "tensor_parallel"])
def test_attention_is_looked_for_in_whole_rows_and_all_heads(model: Path, name: str) -> None:
    settings = ["algorithm.kind=attention", f"attentive.engine.{name}=2", f"attentive.model.path={model}"]
    assert f"compute_attention needs attentive.engine.{name}=1, got 2" in failure("dense_rewards", model, *settings)


@pytest.mark.parametrize(
    ("package", "overrides", "extra"),
    [
        ("deepspeed", ["actor.engine=deepspeed"], "pip install 'rlhf-dist[deepspeed]', or set actor.engine=fsdp"),
        ("peft", ["actor.engine.lora.rank=8"], "pip install 'rlhf-dist[lora]', or set actor.engine.lora=null"),
        ("vllm", [], "or set actor.rollout.engine=transformers"),
    ],
)
def test_an_engine_that_is_not_installed_names_the_extra(
    model: Path, monkeypatch: pytest.MonkeyPatch, package: str, overrides: list[str], extra: str
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else there(name, *a))
    assert extra in failure("ppo", model, *overrides)


def test_settings_that_fit_pass(model: Path) -> None:
    assert plan("ppo", model, "actor.engine=deepspeed", "actor.engine.zero_stage=1", "critic.engine.lora.rank=4")
    assert plan("ppo", model, "actor.engine.sequence_parallel=2", "critic.engine.tensor_parallel=2")
