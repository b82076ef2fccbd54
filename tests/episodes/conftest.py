"""An engine with a tiny random model, and episodes played on it in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import ModelConfig, RolloutConfig
from rlhf_dist.environments import Environment, EpisodeLimits
from rlhf_dist.sampling import Sampling
from rlhf_dist.testing.tiny_model import VOCABULARY, save_llama
from rlhf_dist.wire import Call
from workers.engines.generation.transformers import TransformersEngine
from workers.episodes.leaves import Episode
from workers.episodes.run import run_episodes

PROMPT_TOKENS, RESPONSE_TOKENS = 64, 48
Play = Callable[..., list[Episode]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that never ends a turn by itself unless an environment's text makes it: its end token is improbable."""
    return save_llama(tmp_path_factory.mktemp("model"), hidden=64)


@pytest.fixture(scope="session")
def engine(model: Path) -> TransformersEngine:
    rollout = RolloutConfig(engine="transformers", max_prompt_tokens=PROMPT_TOKENS, max_response_tokens=RESPONSE_TOKENS)
    made = TransformersEngine(model_path=str(model), rollout=rollout, rank=0, world=1, device=torch.device("cpu"))
    made.load(ModelConfig(path=str(model)), 0)
    return made


def prompts(texts: list[str], answers: list[str] | None = None) -> Batch:
    ids = [[1, *(VOCABULARY[character] for character in text)] for text in texts]
    return Batch(
        {
            "prompt_ids": Column.ragged(ids, np.int32),
            "prompt": Column.strings(texts),
            "answer": Column.strings(answers or ["4"] * len(texts)),
            "group_id": Column.dense(np.arange(len(texts))),
        }
    )


@pytest.fixture(scope="session")
def play_all(engine: TransformersEngine, model: Path) -> Play:
    """(environment, limits=, texts=, n=, rows=, seed=, wanted=, first=) -> its episodes."""

    def run(
        environment: Environment,
        limits: EpisodeLimits | None = None,
        texts: tuple[str, ...] = ("2+2=", "1+10="),
        n: int = 1,
        rows: tuple[int, ...] | None = None,
        seed: int = 0,
        **groups: Any,
    ) -> list[Episode]:
        at = np.array(range(len(texts)) if rows is None else rows)
        batch = prompts([texts[k] for k in at])
        call = Call(num_rows=len(at), row_index=at, step=3, node="actor.run_episodes", line="", seed=seed)
        sampling = Sampling(n=n, max_tokens=RESPONSE_TOKENS)
        limits = limits or EpisodeLimits()
        return run_episodes(engine, str(model), batch, call, environment, limits, sampling, PROMPT_TOKENS, **groups)

    return run
