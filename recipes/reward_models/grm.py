"""A reward model that stays a language model (GRM, Yang et al. 2024, arXiv 2406.10216): two losses on one trunk.

L = -(1 - a) log sigma(r(chosen) - r(rejected)) + a L_text          r: a head at the last token
L_text = -log pi(chosen) / |chosen|, or -log sigma(beta (log pi(chosen) - log pi(rejected)))
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from rlhf_dist.algorithms import Head, loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Preferences

PAPERS = {
    "grm": Paper(
        title="GRM: a reward model regularised by its language model",
        year=2024,
        arxiv="2406.10216",
        rows=(107,),
        needs=("RMT", "AUX", "HID"),
        assumed="the reward head is linear",
    ),
    "dpo_noref": Paper(
        title="GRM with DPO without a reference as regulariser",
        year=2024,
        arxiv="2406.10216",
        rows=(107,),
        needs=("RMT", "AUX", "HID"),
        settings={"algorithm.regulariser": "dpo_noref"},
        assumed="beta 0.1; the reward head is linear",
    ),
}


@dataclass(frozen=True, kw_only=True)
class GRM:
    """Settings of a generative reward model."""

    regulariser: Literal["sft", "dpo_noref"] = "sft"
    """What the language model learns: the chosen response, or to prefer it to the other."""
    lm_coef: float = 0.01
    """Weight of the regulariser (alpha); the pair's loss has 1 - alpha."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


class GenerativeRewardModel(Actor, Protocol):
    """A language model that scores what it has read."""

    heads = (Head(name="reward", at="last_token"),)


@loss(reads=("label",), outputs=("log_probs", "heads.reward"), average="groups")
def generative_reward(
    model, rows, lm_coef: float = 0.01, *, regulariser: Literal["sft", "dpo_noref"] = "sft", beta: float = 0.1
):
    """Bradley-Terry on the head, and the likelihood of the chosen response or its preference."""
    chosen, rejected = chosen_and_rejected(model.heads["reward"], rows)
    likelihood, _ = chosen_and_rejected(rows.mean_tokens(model.log_probs), rows)
    metrics = {"accuracy": (chosen > rejected).float(), "margin": (chosen - rejected).detach()}
    if regulariser == "dpo_noref":
        won, lost = chosen_and_rejected(rows.sum_tokens(model.log_probs), rows)
        text = (beta * (lost - won)).logaddexp(0.0 * won)
    else:
        text = -likelihood
    value = (1 - lm_coef) * (rejected - chosen).logaddexp(0.0 * chosen) + lm_coef * text
    return value, metrics | {"lm": likelihood.detach()}


@recipe
def grm(pairs: Preferences, judge: GenerativeRewardModel, cfg: GRM) -> None:
    """A generative reward model on labelled pairs."""
    judge.update_actor(
        pairs, loss=generative_reward(cfg.lm_coef, regulariser=cfg.regulariser), mini_batches=cfg.mini_batches
    )
