"""What tests run on the ranks of a world: engines live there between calls, under names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_dist.config import EngineConfig, ModelConfig, OptimizerConfig, RolloutConfig
from rlhf_dist.reshard.checksum import full_checksum
from rlhf_dist.sampling import Sampling
from rlhf_dist.wire import WorkerContext

Tokens = list[int]
Sampled = tuple[Tokens, list[float], bool]
"""Tokens, their log-probs, finished."""

_engines: dict[str, Any] = {}


def open_engine(key: str, folder: Path, rollout: dict[str, Any] | None = None) -> None:
    """Construct a generation engine; collective."""
    from workers.engines.build import new_generation_engine

    context = WorkerContext(role="actor", rank=dist.get_rank(), world=dist.get_world_size(), device="cpu", seed=0)
    config = RolloutConfig(**({"max_prompt_tokens": 320, "max_response_tokens": 24} | (rollout or {})))
    _engines[key] = new_generation_engine(str(folder), config, context)


def close_engine(key: str) -> None:
    _engines.pop(key).close()


def weights_of(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A checkpoint's parameters under the names that travel."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def sync(key: str, folder: Path, version: int, buckets: int = 3) -> tuple[int, int, int]:
    """Send a checkpoint; returns (parameters, bytes, the version held)."""
    weights = weights_of(folder)
    report = _engines[key].receive_weights(version, _cut(weights, buckets), _checksums(weights))
    return report.parameters, report.bytes, _engines[key].weights_version


def generate(
    key: str, prompts: Sequence[Tokens], sampling: Sampling, seeds: Sequence[int] | None = None
) -> list[Sampled]:
    """Responses of one engine; seeds count up from 1 unless given."""
    arrays = [np.asarray(prompt, dtype=np.int32) for prompt in prompts]
    seeds = range(1, len(prompts) * sampling.n + 1) if seeds is None else seeds
    responses = _engines[key].generate(arrays, sampling, list(seeds))
    return [(r.token_ids.tolist(), r.log_probs.tolist(), r.finished) for r in responses]


def _cut(weights: dict[str, Tensor], buckets: int) -> Iterator[list[tuple[str, Tensor]]]:
    items = list(weights.items())
    size = -(-len(items) // buckets)
    yield from (items[start : start + size] for start in range(0, len(items), size))


def _checksums(weights: dict[str, Tensor]) -> dict[str, int]:
    return {name: full_checksum(tensor) for name, tensor in weights.items()}
