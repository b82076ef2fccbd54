"""What a model folder may hold, said before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTokenClassification, LlamaForCausalLM

from rlhf_dist.config import EngineConfig, ModelConfig
from rlhf_dist.data import end_token_ids
from rlhf_dist.model_folder import check_head, read_shape
from rlhf_dist.typed import ConfigError
from tests.test_checks import plan
from tests.tiny import llama_config, save_classifier, save_llama, save_tokenizer
from workers.engines.model.models import build_model

KEY = "reward.model.path"


def _refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_shape(str(folder), KEY)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    save_llama(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    read_shape(str(tmp_path), KEY)  # beside safetensors it does not matter
    (tmp_path / "model.safetensors").unlink()
    says = _refusal(tmp_path)
    assert "pytorch_model.bin only" in says and "LlamaForCausalLM as M; M.from_pretrained(" in says


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by gptq (quantization_config in"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by awq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised by bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised by fp8"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}},
            "compressed-tensors",
        ),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantised by mxfp4"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "quantised by NVFP4"),
        ({"quantization_config": {"bits": 4}}, "quantised by some method"),
        ({"compression_config": {"format": "pack-quantized"}}, "pack-quantized (compression_config in config.json)"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq (text_config.quantization_config in"),
    ],
)
def test_quantised_weights_are_refused_by_their_method(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    save_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    assert named in (says := _refusal(tmp_path)) and "give the model in bfloat16 or float32" in says
    with pytest.raises(ConfigError, match="quantised"):  # vLLM would build its layers for it at random weights too
        read_shape(str(tmp_path), KEY, weights=False)
    with pytest.raises(ValueError, match="quantised"):
        build_model(ModelConfig(path=str(tmp_path)), EngineConfig(), head="policy", seed=0, trained=True)


def test_quantised_weights_are_known_by_their_files_too(tmp_path: Path) -> None:
    save_llama(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": None})
    )
    read_shape(str(tmp_path), KEY)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    assert "holds quantised weights (it has hf_quant_config.json)" in _refusal(tmp_path)
    (tmp_path / "hf_quant_config.json").unlink()
    weights = {
        name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    assert "mostly F8_E4M3 (in its safetensors files)" in _refusal(tmp_path)


def test_a_folder_that_lacks_a_file_of_its_index_is_named(tmp_path: Path) -> None:
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path, max_shard_size="20kB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    assert "model-00002-of-00006.safetensors is missing, which" in _refusal(tmp_path)


@pytest.mark.parametrize("needed", [True, False])
def test_heads_of_other_layouts_are_named(tmp_path: Path, needed: bool) -> None:
    torch.manual_seed(0)
    config = llama_config()
    config.num_labels = 1
    AutoModelForTokenClassification.from_config(config).save_pretrained(tmp_path / "tokens")
    save_llama(tmp_path / "trl")
    head = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
    save_file(head, tmp_path / "trl" / "more.safetensors")
    for folder, name in (("tokens", "score.bias, score.weight"), ("trl", "v_head.summary.bias, v_head.summary.weight")):
        with pytest.raises(ConfigError, match=f"has {name}, and a value head here is score.weight alone"):
            check_head(str(tmp_path / folder), KEY, needed=needed)


def test_a_reward_model_must_have_a_head_and_a_critic_need_not(tmp_path: Path) -> None:
    save_llama(tmp_path / "policy")
    save_classifier(tmp_path / "classifier")
    check_head(str(tmp_path / "policy"), KEY, needed=False)
    check_head(str(tmp_path / "classifier"), KEY, needed=True)
    with pytest.raises(ConfigError, match="has no score.weight: it is no reward model, and every reward would be 0"):
        check_head(str(tmp_path / "policy"), KEY, needed=True)


def test_check_refuses_a_reward_without_a_head_and_lets_one_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    policy, classifier = save_llama(tmp_path / "policy"), save_classifier(tmp_path / "classifier")
    reward = ["reward.function=null", "data.train.chat=false", "actor.rollout.engine=transformers"]
    plan("ppo", policy, *reward, f"reward.model.path={classifier}")
    with pytest.raises(ConfigError, match=r"reward\.model\.path: .* has no score\.weight"):
        plan("ppo", policy, *reward, f"reward.model.path={policy}")


def test_every_token_that_any_file_names_ends_a_response(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)  # <eos> is 2
    assert end_token_ids(tmp_path) == [2]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert end_token_ids(tmp_path) == [9, 7, 2]
    assert end_token_ids(tmp_path / "none") == []
