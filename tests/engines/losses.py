"""Losses for engine tests, one per way of averaging, and the batch they read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from rlhf_dist.algorithms.contract import Average, ModelOutput, Output, Rows
from rlhf_dist.batch import Batch
from tests.tiny import VOCABULARY

ENTROPY_BONUS = 0.05


@dataclass(frozen=True)
class TokenLoss:
    """Policy gradient with an entropy bonus."""

    reads: tuple[str, ...] = ("advantages",)
    outputs: tuple[Output, ...] = ("log_probs", "entropy")
    average: Average = "tokens"

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        assert model.log_probs is not None and model.entropy is not None
        loss = -rows["advantages"] * model.log_probs - ENTROPY_BONUS * model.entropy
        return loss, {"entropy": model.entropy}


@dataclass(frozen=True)
class RowLoss:
    """Weighted mean negative log-likelihood of each row."""

    reads: tuple[str, ...] = ("weight",)
    outputs: tuple[Output, ...] = ("log_probs",)
    average: Average = "rows"

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        assert model.log_probs is not None
        return -rows["weight"] * rows.mean_tokens(model.log_probs), {}


@dataclass(frozen=True)
class GroupLoss:
    """Preference of the labelled rows of each group."""

    reads: tuple[str, ...] = ("label",)
    outputs: tuple[Output, ...] = ("log_probs",)
    average: Average = "groups"

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        assert model.log_probs is not None
        margin = rows.sum_groups(rows["label"] * rows.sum_tokens(model.log_probs))
        return -F.logsigmoid(0.3 * margin), {"margin": margin}


@dataclass(frozen=True)
class ValueLoss:
    """Squared error of values."""

    reads: tuple[str, ...] = ("returns",)
    outputs: tuple[Output, ...] = ("values",)
    average: Average = "tokens"

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        assert model.values is not None
        return (model.values - rows["returns"]) ** 2, {}


@dataclass(frozen=True)
class ScoreLoss:
    """Bradley-Terry loss of scores at the last token."""

    reads: tuple[str, ...] = ("label",)
    outputs: tuple[Output, ...] = ("scores",)
    average: Average = "groups"

    def __call__(self, model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        assert model.scores is not None
        return -F.logsigmoid(rows.sum_groups(rows["label"] * model.scores)), {}


def make_batch(seed: int = 0, groups: int = 5) -> Batch:
    """Groups of two or three rows of uneven length; one response is empty, some tokens are masked."""
    random = np.random.default_rng(seed)
    rows: list[dict[str, object]] = []
    for group in range(groups):
        prompt = random.integers(4, len(VOCABULARY), random.integers(1, 9))
        for k in range(2 + group % 2):
            length = 0 if (group, k) == (1, 1) else int(random.integers(2, 13))
            mask = (random.random(length) < 0.8).astype(np.uint8)
            mask[:1] = 1
            rows.append(
                {
                    "group_id": 100 + group,
                    "prompt_ids": prompt.astype(np.int32),
                    "response_ids": random.integers(4, len(VOCABULARY), length).astype(np.int32),
                    "response_mask": mask,
                    "advantages": random.normal(size=length).astype(np.float32),
                    "returns": random.normal(size=length).astype(np.float32),
                    "weight": np.float32(random.uniform(0.5, 1.5)),
                    "label": np.int8((1, -1, 0)[k]),
                }
            )
    return Batch.of(**{name: [row[name] for row in rows] for name in rows[0]})
