"""Supervised fine-tuning: maximum likelihood of given responses. No rollout at all."""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import nll
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Examples


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Settings of supervised fine-tuning."""

    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""
    average: Literal["tokens", "rows", "rows_with_tokens", "groups"] = "tokens"
    """What the loss is averaged over: all tokens of the step, or responses."""


@recipe
def sft(examples: Examples, actor: Actor, cfg: SFT) -> None:
    """Supervised fine-tuning on given responses."""
    actor.update_actor(examples, loss=nll(average=cfg.average), mini_batches=cfg.mini_batches)
