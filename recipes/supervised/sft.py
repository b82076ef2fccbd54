"""Supervised fine-tuning: maximum likelihood of given responses. No rollout at all."""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import nll
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Examples

PAPERS = {
    "sft": Paper(title="Supervised fine-tuning", year=2018, needs=("SFT",)),
    "janus": Paper(
        title="Janus: values in system messages",
        year=2024,
        arxiv="2405.17977",
        rows=(69,),
        needs=("SFT", "PREF"),
        assumed=(
            "each row's messages begin with a system message of its own; DPO and ORPO on such rows are their recipes"
        ),
    ),
}


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
