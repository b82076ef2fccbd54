"""Trained on two ranks, exported by the engine and from its checkpoint: one folder, the policy that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_dist.config import LoraConfig, OptimizerConfig
from tests.engines.losses import TokenLoss, make_batch
from tests.engines.test_features import new_engine
from tests.engines.world import World
from tests.generation.families import save_family
from tests.tiny import save_tokenizer
from workers.engines.files.export import export_checkpoint

LORA = {"lora": LoraConfig(rank=4, alpha=8.0, targets=["c_attn", "c_fc", "c_proj"])}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral-zero3": ("mixtral", {"name": "deepspeed", "zero_stage": 3}),
    "a buffer in the files": ("glm4_moe", {}),
    "tied": ("qwen2", {"tensor_parallel": 2}),
    "adapters on transposed layers": ("gpt2", LORA),
}


def _train(folder: Path, engine: dict[str, Any], checkpoint: Path, out: Path) -> Any:
    engine_ = new_engine(folder, OptimizerConfig(lr=1e-2), "policy", **engine)
    batch = make_batch()
    engine_.step(batch, TokenLoss())
    engine_.save(checkpoint).result(60)
    engine_.export(out)
    return engine_.forward(batch, ["log_probs"])["log_probs"]


def _weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_exports_of_engine_and_checkpoint_are_the_policy_that_was_trained(
    world2: World, tmp_path: Path, case: str
) -> None:
    family, engine = CASES[case]
    source, checkpoint, out = save_family(tmp_path / "model", family), tmp_path / "checkpoint", tmp_path / "out"
    save_tokenizer(source)
    defaults = {"eos_token_id": [5, 2], "temperature": 0.7, "top_p": 0.9}
    (source / "generation_config.json").write_text(json.dumps(defaults))
    column = world2.run(_train, source, engine, checkpoint, out)[0]
    export_checkpoint(checkpoint, tmp_path / "later", dtype=None, adapter=False)
    base, by_engine, by_checkpoint = (_weights(folder) for folder in (source, out, tmp_path / "later"))
    assert base.keys() == by_engine.keys() == by_checkpoint.keys()
    changed = 0
    for name, weight in by_engine.items():
        assert weight.shape == base[name].shape
        torch.testing.assert_close(weight, by_checkpoint[name], rtol=0, atol=1e-6)
        changed += not torch.equal(weight, base[name])
    assert changed >= (8 if "adapters" in case else len(base) - 4)
    batch, model = make_batch(), AutoModelForCausalLM.from_pretrained(out).eval()
    for row in range(batch.num_rows):
        prompt, response = batch["prompt_ids"].row(row), batch["response_ids"].row(row)
        if len(response):
            ids = torch.tensor(np.concatenate([prompt, response])[None].astype(np.int64))
            with torch.no_grad():
                log_probs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            wanted = log_probs.gather(-1, ids[0, len(prompt) :, None])[:, 0].numpy()
            np.testing.assert_allclose(column.row(row), wanted, atol=2e-4)
    for folder in (out, tmp_path / "later"):
        settings = json.loads((folder / "generation_config.json").read_text())
        # config.json and the tokenizer name 2 as well
        assert settings == {**defaults, "eos_token_id": [5, 2]}
        assert (folder / "chat_template.jinja").read_text() == (source / "chat_template.jinja").read_text()


def test_a_checkpoint_exports_in_another_dtype_and_its_adapters_load_in_peft(world2: World, tmp_path: Path) -> None:
    import peft

    source = save_family(tmp_path / "model", "gpt2")
    world2.run(_train, source, LORA, tmp_path / "checkpoint", tmp_path / "out")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "half", dtype="bfloat16", adapter=False)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in _weights(tmp_path / "half").values()} == {torch.bfloat16}
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "adapter", dtype=None, adapter=True)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "adapter")
    merged = {name: parameter.detach() for name, parameter in model.merge_and_unload().named_parameters()}
    for name, weight in _weights(tmp_path / "out").items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6)
