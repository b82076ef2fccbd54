"""Requests of the transformers engine where the cache cannot be cut by rows: windows that slide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from rlhf_dist.config import ModelConfig, RolloutConfig
from rlhf_dist.sampling import Sampling
from rlhf_dist.testing.tiny_model import llama_config, save_model
from workers.engines.generation.interface import Request, Response
from workers.engines.generation.transformers import TransformersEngine


def test_rows_of_caches_that_cannot_be_cut_stay_where_they_came(tmp_path: Path) -> None:
    config = Gemma2Config(**(llama_config().to_dict() | {"model_type": "gemma2", "sliding_window": 8, "head_dim": 16}))
    folder = save_model(tmp_path / "model", Gemma2ForCausalLM, config, seed=0)
    rollout = RolloutConfig(engine="transformers", max_prompt_tokens=64, max_response_tokens=16)
    engine = TransformersEngine(model_path=str(folder), rollout=rollout, rank=0, world=1, device=torch.device("cpu"))
    engine.load(ModelConfig(path=str(folder)), 0)
    prompts = [np.array([1, *range(5, 5 + length)], np.int32) for length in (3, 12, 30)]
    sampling = Sampling(max_tokens=14)
    wave = [response.token_ids.tolist() for response in engine.generate(prompts, sampling, [0, 1, 2])]
    requests = [Request(name=f"r{k}", token_ids=prompts[k], sampling=sampling, seed=k) for k in range(3)]
    engine.add(replace(requests[0], name="let go"))
    done: dict[str, Response] = {}
    for step in range(60):
        if step in (1, 3, 6):
            engine.add(requests.pop())
        if step == 4:
            assert engine.abort("let go").token_ids.tolist() == wave[0][:4]
        done |= dict(engine.step())
    assert [done[f"r{k}"].token_ids.tolist() for k in range(3)] == wave
    assert not engine._cohorts and not engine._in_flight
