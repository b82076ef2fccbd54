"""One family, held to the library's own forward of each row alone: log-probs, entropy and the gradient of a step.

Runs in a process that has joined a process group of any size, for tests/engines and `python -m tests.models_table`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_dist.batch import Batch
from rlhf_dist.config import EngineConfig, LoraConfig, ModelConfig, OptimizerConfig
from tests.engines.losses import ENTROPY_BONUS, TokenLoss
from tests.families import VOCABULARY
from workers.engines.training.deepspeed import DeepSpeedEngine
from workers.engines.training.fsdp import FsdpEngine

EXACT = 1e-4
"""Largest difference in nats that is rounding in float32 (most families: 3e-6)."""
EXACT_GRADIENT = 5e-4
"""The same of a gradient, as a share of its largest element (most families: 2e-6)."""


@dataclass(frozen=True)
class Verdict:
    """What training a family comes to."""

    family: str
    state: str
    """`exact`, `refused` (by name, at construction) or `wrong`."""
    way: str = ""
    """How its rows go through the model."""
    difference: float = 0.0
    """Largest of log-probs and entropy, nats."""
    gradient: float = 0.0
    """Largest of the gradient, as a share of its largest element."""
    why: str = ""


def rows(seed: int = 0) -> Batch:
    """Three prompts with two responses each and two with one; rows of 5 to 25 tokens."""
    random = np.random.default_rng(seed)
    prompts = [random.integers(3, VOCABULARY, length).astype(np.int32) for length in (3, 9, 5, 12, 2)]
    prompts = [prompts[k] for k in (0, 0, 1, 1, 2, 2, 3, 4)]
    responses = [random.integers(3, VOCABULARY, length).astype(np.int32) for length in (2, 16, 7, 4, 11, 3, 13, 5)]
    return Batch.of(
        prompt_ids=prompts,
        response_ids=responses,
        response_mask=[np.ones(len(row), np.uint8) for row in responses],
        group_id=np.array([0, 0, 1, 1, 2, 2, 3, 4]),
        advantages=[random.standard_normal(len(row)).astype(np.float32) for row in responses],
    )


def check_training(family: str, folder: Path, model: PreTrainedModel, **engine: Any) -> Verdict:
    """Train one step of the tiny model of `folder`, which `model` holds too, on the same rows on every rank."""
    batch = rows()
    truth, gradients = _alone(model, batch)
    lora = engine.pop("lora", None)
    settings = EngineConfig(
        **{"micro_batch_tokens": 64, **engine},
        lora=LoraConfig(**lora) if lora else None,  # type: ignore[arg-type]
    )
    adapted = settings.lora is not None
    try:
        trained: Any = (_RecordedDeepSpeed if settings.name == "deepspeed" else _RecordedFsdp)(
            model=ModelConfig(path=str(folder)),
            engine=settings,
            optimizer=OptimizerConfig(lr=1e-3),
            head="policy",
            device=torch.device("cpu"),
            seed=0,
        )
    except ValueError as error:
        return Verdict(family, "refused", why=str(error))
    found = trained.forward(batch, ("log_probs", "entropy"))
    off = max(float(np.abs(found[name].values - truth[name]).max()) for name in truth)
    metrics = trained.step(batch, TokenLoss())
    if adapted:  # new parameters: held to plain peft in test_features.py
        slope = 0.0 if metrics["grad_norm"].value > 0 else float("inf")
    elif trained.gradients:
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        slope = max(float((trained.gradients[name] - gradients[name]).abs().max()) for name in gradients) / largest
    else:
        norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
        slope = abs(metrics["grad_norm"].value - norm) / norm
    state = "exact" if off < EXACT and slope < EXACT_GRADIENT else "wrong"
    return Verdict(family, state, str(trained._way), off, slope)


def log_probs_alone(model: PreTrainedModel, batch: Batch) -> np.ndarray[Any, Any]:
    """[tokens] of each row by itself, through the library's own forward."""
    return _alone(model, batch)[0]["log_probs"]


def _alone(model: PreTrainedModel, batch: Batch) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Tensor]]:
    """Log-probs and entropy of each row by itself, and the gradient of `TokenLoss` over all of them."""
    model.zero_grad()
    model.requires_grad_(True)
    tokens = int(batch["response_ids"].lengths.sum())
    found: dict[str, list[Any]] = {"log_probs": [None] * batch.num_rows, "entropy": [None] * batch.num_rows}
    # Shortest first: the library's dynamic rotary frequencies stay those of the longest row seen.
    for row in np.argsort(batch["prompt_ids"].lengths + batch["response_ids"].lengths):
        prompt, response, advantages = (
            batch[name].rows()[row] for name in ("prompt_ids", "response_ids", "advantages")
        )
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        log_p = logits.log_softmax(-1)
        chosen = log_p.gather(-1, torch.from_numpy(response.astype(np.int64))[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        values = -torch.from_numpy(advantages) * chosen - ENTROPY_BONUS * entropy
        (values.sum() / tokens).backward()
        found["log_probs"][row], found["entropy"][row] = chosen.detach().numpy(), entropy.detach().numpy()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: np.concatenate(values) for name, values in found.items()}, gradients


class _RecordedFsdp(FsdpEngine):
    """Keeps the gradient of its last step."""

    def _apply(self, lr: float) -> float:
        self.gradients = {
            name: parameter.grad.full_tensor().clone()
            for name, parameter in self._parameters.items()
            if parameter.grad is not None
        }
        return super()._apply(lr)


class _RecordedDeepSpeed(DeepSpeedEngine):
    """Its gradients are held by their norm."""

    gradients: dict[str, Tensor] = {}
